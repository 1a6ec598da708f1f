"""The main job on tiny models: plans, budgets, determinism, moments that are used again, and what is written."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import twofold
from conftest import TEXT, make_model, make_tokenizer
from twofold.objectives import OBJECTIVES
from twofold.planning.plan import Plan
from twofold.recipe import Recipe, make_recipe
from twofold.report.record import Run
from twofold.run.compress import compress
from twofold.run.plan import plan as plan_of

SMALL = {"tokens": 64, "window": 32, "quiet": True}


def small_recipe(checkpoint, text_file, **settings):
    return make_recipe(
        {
            "model": str(checkpoint),
            "calibration": [str(text_file)],
            "tokens": 128,
            "window": 32,
            "keep": 0.6,
            **settings,
        }
        if "budget" not in settings
        else {"model": str(checkpoint), "calibration": [str(text_file)], "tokens": 128, "window": 32, **settings}
    )


@pytest.mark.parametrize("allocate", ["uniform", "global"])
@pytest.mark.parametrize(
    "name",
    [
        *[one.name for one in OBJECTIVES.all() if one.correct is None],
        "diagonal+whitened", "whitened+rows", "plain+diagonal",
    ],
)  # fmt: skip
def test_every_objective_with_every_allocation(name, allocate):
    model = twofold.factorize(
        make_model(), make_tokenizer(), keep=0.6, objective=name, allocate=allocate, texts=[TEXT], **SMALL
    )
    plan = model.twofold_plan
    assert plan.keep <= 0.6 + 1e-9
    assert plan.keep > (0.5 if allocate == "uniform" or name == "lite-asr" else 0.59)  # the last in multiples of 16
    for entry in plan.entries:
        if entry.rank:
            assert entry.measured_loss == pytest.approx(entry.predicted_loss, rel=1e-3, abs=1e-9 * entry.total_loss)
    assert any("share of each layer's own total" in n for n in plan.notes) == (
        allocate == "global" and name not in ("two-sided", "diagonal+whitened")
    )


@pytest.mark.long
@pytest.mark.whole
def test_what_is_written(checkpoint, text_file, tmp_path):
    out = tmp_path / "deep" / "small"
    recipe = small_recipe(checkpoint, text_file)
    run = compress(recipe, out, quiet=True)
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "plan.json", "recipe.yaml",
            "run.json", "spectra.safetensors", "README.md", "report.html"} <= names  # fmt: skip
    assert [p.name for p in out.parent.iterdir()] == ["small"]
    assert (out / "report.html").read_text(encoding="utf-8").count("<svg") > 7 and len(run.samples) == 2
    plan = Plan.load(out / "plan.json")
    assert Run.model_validate_json((out / "run.json").read_text()) == run
    assert Recipe.model_validate(yaml.safe_load((out / "recipe.yaml").read_text())) == recipe
    assert run.keep == plan.keep and run.bytes_after == plan.bytes_after
    assert run.quality is not None and run.quality.factored["divergence"] > 0
    assert {"load", "calibrate", "decompose", "factorize", "measure", "total"} <= set(run.seconds)
    listed = [f"{e.name}.weight" for e in plan.entries] + [d.name for d in plan.dense]
    assert sorted(listed) == sorted(n for n, _ in make_model().named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in loaded.parameters()) == plan.model_after


@pytest.mark.long
def test_repeats_to_the_bit(checkpoint, text_file, tmp_path, monkeypatch):
    for name in ("one", "two"):
        monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / f"cache-{name}"))
        compress(small_recipe(checkpoint, text_file), tmp_path / name, quiet=True)
    files = ("model.safetensors", "plan.json", "config.json", "spectra.safetensors")
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


@pytest.mark.long
def test_moments_are_used_again_for_another_budget_only_if_they_fit(checkpoint, text_file, tmp_path):
    first = compress(small_recipe(checkpoint, text_file), tmp_path / "a", quiet=True)
    again = compress(small_recipe(checkpoint, text_file, keep=0.8), tmp_path / "b", quiet=True)
    assert not first.moments_reused and again.moments_reused and "calibrate" not in again.seconds
    assert again.fingerprint == first.fingerprint
    for changed in ({"seed": 1}, {"tokens": 96}, {"window": 16}):
        other = compress(small_recipe(checkpoint, text_file, **changed), tmp_path / str(changed), quiet=True)
        assert not other.moments_reused and other.fingerprint != first.fingerprint


@pytest.mark.long
def test_self_calibration_needs_no_text(checkpoint, tmp_path):
    recipe = make_recipe({"model": str(checkpoint), "keep": 0.7, "tokens": 64, "window": 32})
    run = compress(recipe, tmp_path / "a", quiet=True)
    assert run.calibration == "texts sampled from the model itself" and run.calibration_tokens == 64
    assert compress(recipe, tmp_path / "b", quiet=True).moments_reused


@pytest.mark.long
@pytest.mark.parametrize(("budget", "unit"), [("70%", "parameters"), ("0.02M", "parameters"), ("85KB", "bytes")])
def test_budgets_of_the_whole_model(checkpoint, text_file, tmp_path, budget, unit):
    run = compress(small_recipe(checkpoint, text_file, budget=budget), tmp_path / "a", quiet=True)
    if unit == "bytes":
        assert 0.98 * 85e3 < run.bytes_after <= 85e3
    else:
        limit = 0.7 * run.parameters_before if budget == "70%" else 0.02e6
        assert 0.99 * limit < run.parameters_after <= limit


def test_overrides_multiples_and_smallest_ranks():
    model = twofold.factorize(
        make_model(), make_tokenizer(), keep=0.6, texts=[TEXT], rank_multiple=4, min_rank=8,
        overrides={"v_proj": {"dense": True}, "down_proj": {"rank": 12}, "layers.1.mlp.down_proj": {"keep": 0.9}}, **SMALL,
    )  # fmt: skip
    entries = {e.name: e for e in model.twofold_plan.entries}
    assert entries["model.layers.0.self_attn.v_proj"].rank is None
    assert entries["model.layers.0.mlp.down_proj"].rank == 12
    assert 0.75 < entries["model.layers.1.mlp.down_proj"].keep <= 0.9
    assert all(e.rank % 4 == 0 and e.rank >= 8 for e in entries.values() if e.rank)
    assert model.twofold_plan.keep <= 0.6


def test_plan_without_calibration_says_so(checkpoint, text_file):
    plan = plan_of(make_recipe({"model": str(checkpoint), "keep": 0.6}), quiet=True)
    assert "no calibration was named" in plan.notes[0] and plan.predicted_divergence is None
    full = plan_of(small_recipe(checkpoint, text_file), quiet=True)
    assert not full.notes and full.predicted_divergence > 0


@pytest.mark.long
def test_predicted_divergence_is_of_the_right_size(checkpoint, text_file, tmp_path):
    """A second-order estimate: it must grow with the cut, and lie within a factor of three where the cut is small."""
    runs = [
        compress(small_recipe(checkpoint, text_file, keep=k, tokens=512), tmp_path / str(k), quiet=True)
        for k in (0.95, 0.8)
    ]
    assert runs[0].predicted_divergence < runs[1].predicted_divergence
    measured = runs[0].quality.factored["divergence"]
    assert measured / 3 < runs[0].predicted_divergence < measured * 3


@pytest.mark.long
def test_bfloat16_checkpoints_stay_bfloat16(tmp_path, text_file):
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "narrow")
    make_tokenizer().save_pretrained(tmp_path / "narrow")
    run = compress(small_recipe(tmp_path / "narrow", text_file), tmp_path / "small", quiet=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.dtype == torch.bfloat16
    assert sum(p.stat().st_size for p in (tmp_path / "small").glob("model*.safetensors")) < run.bytes_after + 20_000
    assert run.machine.dtype == "float32"


def test_a_loaded_model_is_changed_in_place_and_keeps_its_flags():
    model = make_model()
    result = twofold.factorize(model, make_tokenizer(), keep=0.7, texts=iter([TEXT]), **SMALL)
    assert result is model and not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_plan_json_round_trip(checkpoint, text_file, tmp_path):
    plan = plan_of(small_recipe(checkpoint, text_file), quiet=True)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    (tmp_path / "plan.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(twofold.TwofoldError, match="is not a plan"):
        Plan.load(tmp_path / "plan.json")
