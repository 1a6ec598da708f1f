"""One dial: what an effort stands for, that a named part comes first, and what plan says of the time of all three."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import yaml

import twofold
from runs import same
from twofold.cli.settings import settings_flags
from twofold.errors import TwofoldError
from twofold.recipe import Recipe, make_recipe
from twofold.recipe.effort import EFFORTS, PARTS, at_effort, effort_words
from twofold.run.estimate.busy import Busy


def recipe(**settings: Any) -> Recipe:
    return make_recipe({"model": "m", "keep": 0.5, **settings})


def parts(settings: Recipe) -> dict[str, Any]:
    return settings.model_dump(include=set(PARTS))


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_stands_for_its_parts(effort):
    level, dialled = EFFORTS[effort], recipe(effort=effort)
    assert parts(dialled) == {**vars(level), "refine": list(level.refine)}
    words = effort_words(dialled, streams=True)
    assert words.startswith(f"effort {effort}: tokens {level.tokens}, ")
    assert ("refine distill, 10 minutes" in words) == (effort == "balanced")
    assert f"samples {level.samples}," in effort_words(dialled, streams=False)


def test_without_an_effort_nothing_is_other_than_it_was():
    plain = recipe()
    assert parts(plain) == {"tokens": 65536, "samples": 256, "refine": [], "minutes": None}
    assert "effort" not in yaml.safe_load(plain.to_yaml())


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({"tokens": 96}, {"tokens": 96, "refine": ["distill"], "minutes": 25}),
        ({"minutes": 3}, {"tokens": 131072, "refine": ["distill"], "minutes": 3}),
        ({"refine": "blockwise"}, {"refine": ["blockwise"], "minutes": 25}),
        ({"refine": "none"}, {"refine": [], "minutes": None}),
        ({"refine_steps": 5}, {"refine": ["distill"], "minutes": None}),
        ({"bits": 8}, {"tokens": 131072, "refine": [], "minutes": None}),  # integers are not refined
    ],
)
def test_a_part_that_is_named_comes_first(given, then):
    dialled = recipe(effort="best", **given)
    assert parts(dialled).items() >= then.items()
    stored = make_recipe(yaml.safe_load(dialled.to_yaml()))  # names all parts
    assert stored.model_dump() == dialled.model_dump()
    for other in EFFORTS:
        assert parts(at_effort(stored, other)) == parts(recipe(effort=other, **given))


def test_the_parts_of_an_effort_are_not_taken_for_named_ones():
    """A text model refuses samples that were asked for, and a model of samples tokens; but not those of the dial."""
    for effort in EFFORTS:
        stored = make_recipe(yaml.safe_load(recipe(effort=effort).to_yaml()))
        assert not any(stored.chosen(name) for name in PARTS)
    assert recipe(effort="fast", tokens=96).chosen("tokens")


def test_an_unknown_effort_is_one_sentence():
    with pytest.raises(TwofoldError, match=r"^`effort`: input should be 'fast', 'balanced' or 'best', got 'much'$"):
        recipe(effort="much")


def test_a_flag_puts_aside_what_the_effort_of_a_file_stood_for(tmp_path, checkpoint):
    made: list[Recipe] = []

    @settings_flags(make_recipe, Recipe)
    def command(settings: Recipe) -> None:
        made.append(settings)

    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(model=str(checkpoint), effort="best", seed=3).to_yaml())
    command(recipe=file)
    command(recipe=file, effort="fast", minutes=2.0)
    assert [settings.effort for settings in made] == ["best", "fast"]
    assert parts(made[0]) == parts(recipe(effort="best")) and made[1].seed == 3
    assert parts(made[1]) == parts(recipe(effort="fast", minutes=2.0))


@pytest.mark.long
def test_the_recipe_of_a_run_with_an_effort_repeats_it_to_the_bit(checkpoint, text_file, tmp_path, capfd):
    small = {
        "calibration": [str(text_file)],
        "window": 32,
        "tokens": 320,
        "keep": 0.6,
        "eval_windows": 0,
    }
    twofold.compress({"model": str(checkpoint), **small, "effort": "fast"}, tmp_path / "a")
    assert "effort fast: tokens 320, no refinement" in capfd.readouterr().err
    again = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    assert (again.pop("effort"), again.pop("samples")) == ("fast", 64)
    twofold.compress(again, tmp_path / "b", quiet=True)  # by the parts, which it names
    same(tmp_path / "a", tmp_path / "b")


@pytest.mark.long
def test_factorize_has_the_dial_too(checkpoint, text_file):
    kept = {"calibration": str(text_file), "window": 32, "tokens": 64, "keep": 0.6, "quiet": True}
    dialled, plain = (twofold.factorize(str(checkpoint), **kept, **more) for more in ({"effort": "fast"}, {}))
    values = plain.state_dict()
    assert all(bool((value == values[name]).all()) for name, value in dialled.state_dict().items())


def test_plan_tells_the_time_of_all_three(checkpoint, capsys):
    from twofold.cli.plan import print_plan

    plan = twofold.plan(str(checkpoint), keep=0.6, window=64, quiet=True)
    assert plan.estimate is not None
    fast, balanced, best = plan.estimate.efforts
    assert [level.effort for level in plan.estimate.efforts] == list(EFFORTS)
    assert 0 < (fast.seconds or 0) < (balanced.seconds or 0) < (best.seconds or 0)
    assert balanced.words == "tokens 65536, refine distill, 10 minutes"
    print_plan(plan)
    out = capsys.readouterr().out
    assert "Time by effort" in out and best.words in out


def test_a_probe_that_is_disturbed_is_told(checkpoint, monkeypatch):
    @contextmanager
    def crowded():
        yield Busy(processors=2, threads=2, wall=10.0, own=5.0, others=1.5)

    monkeypatch.setattr("twofold.run.estimate.estimate.watch_processors", crowded)
    plan = twofold.plan(str(checkpoint), keep=0.6, window=64, quiet=True)
    assert plan.estimate is not None
    assert plan.estimate.free_seconds == pytest.approx(plan.estimate.total_seconds / 4, abs=0.1)
    (note,) = (note for note in plan.notes if "probed" in note)
    assert note.startswith("other programs took 1.5 processors") and "plan again when the machine is free" in note
