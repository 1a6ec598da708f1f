"""A quality in the place of a size: what is read and refused, the search, and the models that it finds."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import twofold
from conftest import TEXT, make_model, make_tokenizer
from runs import SERVER
from twofold.evaluation.reference import DenseReference
from twofold.host.unfinished import work_folder
from twofold.planning.plan import Plan
from twofold.recipe import Recipe, make_recipe
from twofold.report.record import Probe, Run
from twofold.run.compress import compress
from twofold.run.plan import plan as plan_of
from twofold.run.search import TOLERANCE, smallest
from twofold.run.status import status
from twofold.settings.goal import parse_perplexity
from twofold.task.causal_lm import CausalLM
from twofold.task.output.quality import measure_quality
from twofold.task.text.texts import TokenWindows

SMALL = {"tokens": 256, "window": 32, "eval_windows": 4}


def goal_recipe(checkpoint, text_file, **settings):
    return make_recipe({"model": str(checkpoint), "calibration": [str(text_file)], **SMALL, **settings})


def probes_of(least, threshold, estimate):
    """Search for the shares from a threshold on."""
    asked = []

    def probe(keep):
        asked.append(keep)
        return Probe(keep=keep, kept=keep, perplexity=1 / keep, divergence=1 - keep, met=keep >= threshold)

    probes = smallest(least, probe, estimate)
    assert [one.keep for one in probes] == asked
    return probes


@settings(max_examples=100, deadline=None)
@given(
    least=st.floats(0.001, 0.6).map(lambda x: round(x, 4)),
    threshold=st.floats(0.0, 1.0),
    guess=st.one_of(st.none(), st.floats(0.0, 1.0)),
)
def test_the_answer_is_bracketed_closely_whatever_the_estimate(least, threshold, guess):
    probes = probes_of(least, threshold, lambda _: guess)
    assert len(probes) <= 27 and all(least <= one.keep < 1 for one in probes)
    assert len({one.keep for one in probes}) == len(probes)
    met = min((one.keep for one in probes if one.met), default=1.0)
    failed = max((one.keep for one in probes if not one.met), default=None)
    if threshold <= least:
        assert met == least and failed is None
    else:
        assert failed < threshold and met - failed <= TOLERANCE


def test_bisection_takes_eight_probes_and_a_good_estimate_three():
    assert len(probes_of(0.01, 0.7321, lambda _: None)) == 8
    assert len(probes_of(0.01, 0.7321, lambda _: 0.7321)) <= 3
    assert len(probes_of(0.2, 0.1, lambda _: 0.1)) == 1


def test_a_search_that_nothing_smaller_meets():
    probes = probes_of(0.1, 1.0, lambda _: None)
    assert not any(one.met for one in probes) and probes[-1].keep >= 1 - TOLERANCE


@pytest.mark.parametrize(
    ("text", "expected"),
    [("25", (25.0, "perplexity")), ("25.5", (25.5, "perplexity")), ("1.1x", (1.1, "times")), (" 2 × ", (2.0, "times"))],
)
def test_perplexities_are_read(text, expected):
    assert parse_perplexity(text) == expected


@pytest.mark.parametrize("text", ["", "x", "-2", "1.1y", "0.9x", "0.5", "nan", "110%"])
def test_perplexities_that_can_not_be_read_or_met(text):
    with pytest.raises(twofold.TwofoldError, match="`perplexity_at_most`: must be"):
        make_recipe({"model": "m", "perplexity_at_most": text})


@pytest.mark.parametrize("two", [{"keep": 0.5}, {"budget": "70%"}, {"kl_at_most": 0.1}])
def test_one_size_only(two):
    with pytest.raises(twofold.TwofoldError, match="only one of them"):
        make_recipe({"model": "m", "perplexity_at_most": "1.1x", **two})


def test_a_number_in_yaml_is_read_and_a_stored_recipe_keeps_the_goal():
    recipe = make_recipe({"model": "m", **yaml.safe_load("perplexity_at_most: 25.0")})
    assert recipe.goal.kind == "perplexity" and recipe.goal.limit == 25
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.at(0.5).keep == 0.5 and recipe.at(0.5).goal is None
    assert make_recipe({"model": "m", "kl_at_most": 0.05}).goal.kind == "divergence"


def test_a_reference_gives_the_numbers_of_both_models_side_by_side(tmp_path):
    windows = TokenWindows(torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0)), "drawn")
    first, second = make_model(seed=0), make_model(seed=1)
    task, calls = CausalLM(), []

    def original(i):
        calls.append(1)
        return task.outputs(first, windows.batch(i, i + 1))

    def other(i):
        return task.outputs(second, windows.batch(i, i + 1))

    together = measure_quality([original, other], windows, task, quiet=True)
    calls.clear()
    reference = DenseReference(original, windows, task, tmp_path, "a", quiet=True)
    assert [reference.quality, reference.measure(other, original, quiet=True)] == together
    assert reference.measure(original, original, quiet=True).divergence == 0 and len(calls) == 6
    calls.clear()
    assert DenseReference(original, windows, task, tmp_path, "a", quiet=True).quality == together[0] and not calls
    assert DenseReference(original, windows, task, tmp_path, "b", quiet=True).quality == together[0] and len(calls) == 3


@pytest.mark.long
def test_a_reference_that_is_not_kept_gives_the_same_numbers(checkpoint, text_file, tmp_path, monkeypatch):
    """The original is run again for every model, and it is the dense one that is run."""
    recipe = goal_recipe(checkpoint, text_file, kl_at_most=0.05)
    kept = compress(recipe, tmp_path / "kept", quiet=True)
    monkeypatch.setattr("twofold.evaluation.reference.LIMIT", 0)
    again = compress(recipe, tmp_path / "again", quiet=True)
    assert again.probes == kept.probes and again.quality == kept.quality
    assert min(one.divergence for one in again.probes) > 0


def test_files_of_another_reference_are_not_read(tmp_path, monkeypatch):
    model, task = make_model(), CausalLM()
    first, second = (
        TokenWindows(torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(i)), "drawn")
        for i in (0, 1)
    )

    def original(windows):
        return lambda i: task.outputs(model, windows.batch(i, i + 1))

    DenseReference(original(first), first, task, tmp_path, "a", quiet=True)
    monkeypatch.setattr("twofold.evaluation.reference.LIMIT", 0)
    reference = DenseReference(original(second), second, task, tmp_path, "a", quiet=True)
    assert reference.measure(original(second), original(second), quiet=True).divergence == 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("goal", "allocate"),
    [({"perplexity_at_most": "1.03x"}, "global"), ({"kl_at_most": 0.05}, "global"), ({"kl_at_most": 0.05}, "uniform")],
)
def test_the_model_meets_the_goal_and_a_smaller_one_does_not(checkpoint, text_file, tmp_path, goal, allocate):
    out = tmp_path / "small"
    # On its own samples a model of random weights has the least perplexity; on other text it may gain from any change.
    text = "self" if "perplexity_at_most" in goal else text_file
    run = compress(goal_recipe(checkpoint, text, allocate=allocate, **goal), out, quiet=True)
    dense, factored = run.quality.original, run.quality.factored
    met = [one for one in run.probes if one.met]
    chosen = min(met, key=lambda one: one.keep)
    if "kl_at_most" in goal:
        assert factored["divergence"] <= 0.05
    else:
        assert factored["perplexity"] <= 1.03 * dense["perplexity"]
    # What was written is what was measured in the search, and the search ended closely above what fails.
    assert (factored["perplexity"], factored["divergence"]) == (chosen.perplexity, chosen.divergence)
    assert run.keep == chosen.kept < 1
    assert chosen.keep - max(one.keep for one in run.probes if not one.met) <= TOLERANCE
    assert len(run.probes) <= 12
    plan = Plan.load(out / "plan.json")
    assert any("measured on held-out text" in note and "4 windows of 32 tokens" in note for note in plan.notes)
    assert all(any(f"keep {one.keep:.4f}: perplexity" in note for note in plan.notes) for one in run.probes)
    assert Run.model_validate_json((out / "run.json").read_text()).probes == run.probes
    again = compress(goal_recipe(checkpoint, text, allocate=allocate, keep=chosen.keep), tmp_path / "same", quiet=True)
    assert again.keep == run.keep
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "same" / "model.safetensors").read_bytes()


@pytest.mark.long
def test_the_stored_recipe_gives_the_same_bits(checkpoint, text_file, tmp_path):
    recipe = goal_recipe(checkpoint, text_file, perplexity_at_most="1.1x")
    first = compress(recipe, tmp_path / "one", quiet=True)
    stored = make_recipe(yaml.safe_load((tmp_path / "one" / "recipe.yaml").read_text()))
    second = compress(stored, tmp_path / "two", quiet=True)
    assert second.probes == first.probes and second.moments_reused
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.long
def test_the_evaluation_text_decides_if_there_is_one(checkpoint, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    run = compress(
        goal_recipe(checkpoint, text_file, kl_at_most=0.05, eval_text=str(other), eval_windows=1),
        tmp_path / "a",
        quiet=True,
    )
    assert run.quality.text == "other.txt" and run.quality.window == 128
    assert run.quality.factored["divergence"] == min(run.probes, key=lambda one: (not one.met, one.keep)).divergence
    bare = goal_recipe(checkpoint, text_file, kl_at_most=0.05, eval_text=str(other), eval_windows=1, objective="svd")
    assert compress(bare, tmp_path / "b", quiet=True).quality.factored["divergence"] <= 0.05


@pytest.mark.long
def test_the_smallest_possible_model_is_enough(checkpoint, text_file, tmp_path):
    run = compress(goal_recipe(checkpoint, text_file, kl_at_most=1e6, min_rank=4), tmp_path / "a", quiet=True)
    assert len(run.probes) == 1 and any("the smallest model that these settings allow" in note for note in run.notes)
    entries = Plan.load(tmp_path / "a" / "plan.json").entries
    assert all(e.rank == 4 for e in entries)
    recipe = goal_recipe(checkpoint, text_file, kl_at_most=1e6, overrides={"v_proj": {"dense": True}})
    held = compress(recipe, tmp_path / "b", quiet=True)
    assert {e.rank for e in Plan.load(tmp_path / "b" / "plan.json").entries if e.kind == "v_proj"} == {None}
    assert held.keep > run.keep / 4


@pytest.mark.long
def test_in_python_and_in_a_plan(checkpoint, text_file, tmp_path):
    recipe = goal_recipe(checkpoint, text_file, perplexity_at_most="1.1x")
    run = compress(recipe, tmp_path / "out", quiet=True)
    plan = plan_of(recipe, quiet=True)
    assert plan.keep == run.keep and all(e.form in (None, "gauge") for e in plan.entries)
    model = make_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = twofold.factorize(
        model, make_tokenizer(), texts=[TEXT], perplexity_at_most="1.1x", quiet=True, **SMALL
    ).twofold_plan
    assert found.keep == run.keep
    # What stayed dense is what it was: every probe gave its layers back.
    kept = [name for name, p in model.named_parameters() if name in before]
    assert kept and all(torch.equal(dict(model.named_parameters())[name], before[name]) for name in kept)


@pytest.mark.long
def test_refinement_comes_after(checkpoint, text_file, tmp_path):
    recipe = goal_recipe(checkpoint, text_file, kl_at_most=0.1, refine="distill", refine_steps=2)
    run = compress(recipe, tmp_path / "a", quiet=True)
    met = min((one for one in run.probes if one.met), key=lambda one: one.keep)
    assert run.keep == met.kept and run.refinement
    assert any("before the refinement" in note for note in run.notes)
    assert run.quality.factored["divergence"] != met.divergence


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"perplexity_at_most": "1.5"}, "the dense model itself has a perplexity of"),
        ({"eval_windows": 0}, "`eval_windows=0` measures nothing"),
        ({"tokens": 32, "calibration": "SHORT"}, "no calibration text is left over"),
        ({"stream": "always"}, "worked through block by block; give `keep` or `budget`, or leave `stream` out$"),
        ({"perplexity_at_most": "1.00000001x", "form": "plain"}, "no model that is smaller by more than 0.5% meets"),
    ],
)
def test_what_can_not_be_met_or_measured_is_refused(checkpoint, text_file, tmp_path, changed, message):
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:60])
    changed = {k: str(short) if v == "SHORT" else v for k, v in changed.items()}
    with pytest.raises(twofold.TwofoldError, match=message):
        compress(
            goal_recipe(checkpoint, text_file, **{"perplexity_at_most": "1.1x", **changed}), tmp_path / "a", quiet=True
        )
    assert not (tmp_path / "a").exists()
    if "form" not in changed:  # refused before the calibration
        assert not list((tmp_path / "cache").glob("moments/*")) and not work_folder(tmp_path / "a").exists()


def test_a_plan_without_a_calibration_is_refused(checkpoint):
    with pytest.raises(twofold.TwofoldError, match="needs measuring: name `calibration=FILE`"):
        plan_of(make_recipe({"model": str(checkpoint), "kl_at_most": 0.1}), quiet=True)


def killed_search(recipe: Recipe, out: Path, cache: Path) -> None:
    """Run a search that is killed when it is to measure a third model."""
    from twofold.run.sizing import Sizing

    os.environ["TWOFOLD_CACHE"] = str(cache)
    measure, count = Sizing._measure, []

    def stop(self: Sizing, plan: Plan) -> Probe:
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        count.append(1)
        return measure(self, plan)

    Sizing._measure = stop
    compress(recipe, out, quiet=True)


@pytest.mark.long
def test_a_killed_search_measures_nothing_twice(checkpoint, text_file, tmp_path, monkeypatch):
    from twofold.run.sizing import Sizing

    out = tmp_path / "small"
    recipe = goal_recipe(checkpoint, text_file, allocate="svd-llm-v2", kl_at_most=0.05)
    killed = SERVER.Process(target=killed_search, args=(recipe, out, tmp_path / "cache"))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert status(out).measured == 2
    measured = []
    measure = Sizing._measure
    monkeypatch.setattr(Sizing, "_measure", lambda self, plan: measured.append(1) or measure(self, plan))
    run = compress(recipe, out, quiet=True)
    distinct = len({one.kept for one in run.probes})
    assert len(measured) == distinct - 2 > 0 and not work_folder(out).exists()
    measured.clear()
    straight = compress(recipe, tmp_path / "straight", quiet=True)
    assert straight.probes == run.probes and len(measured) == distinct
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "straight" / "model.safetensors").read_bytes()


@pytest.mark.long
def test_the_dense_model_runs_over_the_text_once(checkpoint, text_file, tmp_path, monkeypatch):
    from twofold.task.output.categorical import Categorical

    scored = []
    score = Categorical.score
    monkeypatch.setattr(Categorical, "score", lambda *given: scored.append(1) or score(*given))
    run = compress(goal_recipe(checkpoint, text_file, kl_at_most=0.05), tmp_path / "a", quiet=True)
    distinct = len({one.kept for one in run.probes})
    assert len(scored) == 4 * (1 + distinct + 1)  # the dense model, each probe, and the model that was written
    assert math.isfinite(run.quality.factored["divergence"])
