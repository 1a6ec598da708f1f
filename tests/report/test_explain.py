"""A plan in words: that each sentence says what the plan, the spectra and another plan say."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

import twofold
import twofold.cli
from twofold.evidence.beside import measure_beside
from twofold.factor.prepared import Prepared
from twofold.host.clock import Stopwatch
from twofold.nn.int_matrix import int_bytes
from twofold.planning.make import make_plan
from twofold.planning.plan import Plan
from twofold.recipe import Recipe, make_recipe
from twofold.report import explain
from twofold.report.messages import Words
from twofold.run.open import open_for
from twofold.run.prepare import prepare

WORDS = Words("en")


@pytest.fixture
def settings(checkpoint, text_file):
    return {"model": str(checkpoint), "calibration": [str(text_file)], "tokens": 128, "window": 32}


def prepared(settings: dict[str, Any], **more: Any) -> tuple[Recipe, Prepared]:
    """Go through all stages up to the plan."""
    recipe = make_recipe({**settings, **more})
    return recipe, prepare(recipe, open_for(recipe, quiet=True), Stopwatch(), bases=False, quiet=True)


def in_words(recipe: Recipe, made: Prepared, rounded: dict[int, float], language: str = "en") -> list[str]:
    return explain.explain(recipe, made.request(recipe), made.plan, rounded, Words(language))


def test_it_names_the_extremes_and_what_moving_a_tenth_costs(settings):
    plan = twofold.plan(settings, keep=0.6, explain=True, quiet=True)
    ranked = [entry for entry in plan.entries if entry.rank is not None]
    ends = [choose(ranked, key=lambda entry: entry.keep) for choose in (max, min)]
    said = [next(s for s in plan.explanation if f"keeps the {word}" in s) for word in ("most", "least")]
    for entry, sentence in zip(ends, said, strict=True):
        assert sentence.startswith(f"{entry.name} ({entry.out_features} × {entry.in_features})")
        assert f"rank {entry.rank} of {min(entry.out_features, entry.in_features)}" in sentence
    (moved,) = (s for s in plan.explanation if s.startswith("If a tenth"))
    assert all(entry.name in moved for entry in ends)
    assert float(re.findall(r"lose ([\d.]+) times", moved)[0]) >= 1, "the plan is the best at its size"


def test_a_further_piece_buys_what_another_plan_predicts(settings, monkeypatch):
    monkeypatch.setattr(explain, "MEGABYTE", 4000.0)
    plan = twofold.plan(settings, keep=0.6, explain=True, quiet=True)
    (sentence,) = (s for s in plan.explanation if s.startswith("One megabyte more"))
    before, after = (float(x) for x in re.findall(r"\(([\d.]+) to ([\d.]+) nats", sentence)[0])
    larger = twofold.plan(settings, keep=(plan.target_after + 1000) / plan.target_before, quiet=True)
    assert before == pytest.approx(plan.predicted_divergence, rel=5e-3)
    assert after == pytest.approx(larger.predicted_divergence, rel=2e-2) and after < before
    assert 1 <= len(re.findall(r"\(rank \d+ to (?:rank \d+|whole)\)", sentence)) <= 3


def test_integers_are_compared_at_their_bytes(settings):
    recipe, made = prepared(settings, keep=0.6)
    rounded = measure_beside(made.loaded.residence, made.targets, made.decomposition, recipe).rounded
    assert 0 < rounded[8] < rounded[4]
    for keep, key in ((0.6, "why.better"), (1.0, "why.trade"), (0.1, "why.smaller")):
        recipe = recipe.model_copy(update={"keep": keep})
        plan = make_plan("tiny", made.targets, made.spectra.values, recipe, 4)
        sizes = {"now": plan.bytes_after - plan.dense_bytes}
        for name, bits, group in (("eight", 8, None), ("four", 4, 64)):
            sizes[name] = sum(int_bytes(e.out_features, e.in_features, bits, group) + 4 for e in plan.entries)
        said = explain.explain(recipe, made.request(recipe), plan, rounded, WORDS)
        told = {name: WORDS.megabytes(size) for name, size in sizes.items()}
        assert WORDS.say("why.sizes", **told) in said
        assert WORDS.say(key, bits=8, size=told["eight"], lost=WORDS.number(rounded[8] / 2)) in said


def test_what_is_not_predicted_is_said_not_to_be(settings):
    plan = twofold.plan(settings, keep=0.6, objective="svd-llm", explain=True, quiet=True)
    assert WORDS.say("why.unknown") in plan.explanation and WORDS.say("why.better.rule") in plan.explanation
    blind = twofold.plan(settings["model"], keep=0.6, explain=True, estimate=False, quiet=True)
    assert blind.explanation[0] == WORDS.say("why.shapes") and WORDS.say("why.unknown") in blind.explanation
    assert twofold.plan(settings["model"], keep=0.6, estimate=False, quiet=True).explanation == []


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"budget": "60KB", "bits": "auto"}, marks=pytest.mark.long),
        {"keep": 0.7, "objective": "modegpt"},
        {"objective": "qera-exact", "bits": 4},
        {"keep": 0.6, "allocate": "uniform", "form": "plain"},
        {"keep": 0.6, "overrides": {"*": {"rank": 3}}},
    ],
)
def test_every_kind_of_plan_is_explained_in_both_languages(settings, more):
    recipe, made = prepared(settings, **more)
    one, other = (in_words(recipe, made, {8: 1e-5, 4: 1e-3}, language) for language in ("en", "es"))
    assert len(one) == len(other) >= 3
    for english, spanish in zip(one, other, strict=True):
        assert english != spanish and not re.search(r"[{}]|None|nan", english + spanish)


@pytest.mark.long
def test_the_command_prints_and_keeps_it(settings, tmp_path, monkeypatch, capsys):
    flags = ["--calibration", *settings["calibration"], "--tokens", "320", "--window", "32", "--keep", "0.6", "--quiet"]

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["twofold", *arguments])
        with pytest.raises(SystemExit) as stop:
            twofold.cli.main()
        captured = capsys.readouterr()
        assert not stop.value.code, captured.err
        return captured.out

    said = json.loads(run("plan", settings["model"], *flags, "--explain", "--lang", "es", "--json"))["explanation"]
    assert any(sentence.startswith("Un megabyte más") for sentence in said)
    out = run("compress", settings["model"], *flags, "--eval-windows", "0", "--explain", "--out", str(tmp_path / "out"))
    assert "• One megabyte more" in out
    kept = json.loads((tmp_path / "out" / "run.json").read_text())["explanation"]
    assert kept == Plan.load(tmp_path / "out" / "plan.json").explanation and WORDS.say("why.rule") in kept
