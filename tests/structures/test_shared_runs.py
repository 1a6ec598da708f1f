"""Runs that give blocks common bases: plans, budgets, refinements, searches and comparisons, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import twofold
from bases import logits, shared_layers, shared_model
from twofold.model.load import load_model
from twofold.nn.places import BASES
from twofold.planning.plan import Plan
from twofold.recipe import make_recipe
from twofold.refine import REFINEMENTS, Refined
from twofold.refine.steps.training import trainable
from twofold.run.inspect import inspect
from twofold.run.plan import plan as plan_of


def test_budgets_overrides_and_multiples():
    plan = shared_model(
        overrides={"q_proj": {"rank": 5}, "*.up_proj": {"dense": True}, "*.0.mlp.gate_proj": {"keep": 0.5}},
        rank_multiple=2,
    ).twofold_plan
    by_name = {entry.name.removeprefix("model.layers."): entry for entry in plan.entries}
    assert {by_name[f"{i}.self_attn.q_proj"].rank for i in (0, 1)} == {4}
    assert by_name["0.self_attn.q_proj"].basis == by_name["1.self_attn.q_proj"].basis is not None
    assert "an override says so" in by_name["1.self_attn.q_proj"].reason
    assert by_name["0.mlp.up_proj"].rank is by_name["1.mlp.up_proj"].rank is by_name["0.mlp.up_proj"].basis is None
    gate = by_name["0.mlp.gate_proj"]
    assert (
        gate.basis is None and gate.keep <= 0.5 and "an override holds for it or for the others" in " ".join(plan.notes)
    )
    assert all(entry.rank % 2 == 0 for entry in plan.entries if entry.rank)
    for form in ("gauge", "plain"):
        small = shared_model(budget="70KB", form=form).twofold_plan
        assert 66_000 < small.bytes_after <= 70_000


def test_a_plan_without_calibration(checkpoint):
    recipe = make_recipe({"model": str(checkpoint), "keep": 0.5, "objective": "basis-sharing", "share_blocks": 2})
    plan = plan_of(recipe, estimate=False)
    assert plan.keep <= 0.5 and {e.form for e in plan.entries} == {"shared-columns", "gauge"}
    more = recipe.model_copy(update={"share_blocks": 8})
    peaks = [plan_of(one).estimate.memory["factorize"] for one in (recipe, more)]
    assert peaks[0] < peaks[1]
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    text = plan.model_dump_json().replace('"form":"shared-columns"', '"form":"rows"')
    with pytest.raises(ValueError, match="the form rows does not go with the shared basis"):
        Plan.model_validate_json(text)


@pytest.mark.whole
@pytest.mark.long
def test_compress_writes_what_it_says(checkpoint, text_file, tmp_path):
    recipe = make_recipe(
        {
            "model": str(checkpoint), "keep": 0.7, "objective": "basis-sharing", "calibration": [str(text_file)],
            "tokens": 256, "window": 32, "eval_windows": 1,
        }
    )  # fmt: skip
    run = twofold.compress(recipe, tmp_path / "out", quiet=True)
    assert run.keep <= 0.7 and run.quality is not None
    plan = Plan.load(tmp_path / "out" / "plan.json")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert plan.bytes_after == run.bytes_after == sum(t.numel() * t.element_size() for t in stored.values())
    loaded = load_model(str(tmp_path / "out")).model
    assert set(shared_layers(loaded)) == {entry.name for entry in plan.entries if entry.basis}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "one of which serves several blocks" in page and "on a basis for 2 blocks" in page
    found = inspect(str(tmp_path / "out"))
    assert found.total_numbers == plan.model_after
    bases = [weight for weight in found.weights if weight.kind == "basis"]
    assert len(bases) == len({entry.basis for entry in plan.entries if entry.basis})
    assert found.target_numbers == plan.target_after
    with pytest.raises(twofold.TwofoldError, match="factorized already"):
        twofold.compress(recipe.model_copy(update={"model": str(tmp_path / "out")}), tmp_path / "twice", quiet=True)


@pytest.mark.long
def test_what_was_left_dense_can_be_factorized_later(checkpoint, text_file, tmp_path):
    settings = {
        "keep": 0.6, "objective": "basis-sharing", "calibration": [str(text_file)], "tokens": 128, "window": 32, "eval_windows": 1
    }  # fmt: skip
    first = make_recipe({"model": str(checkpoint), "include": ["q_proj"], **settings})
    twofold.compress(first, tmp_path / "first", quiet=True)
    second = make_recipe({"model": str(tmp_path / "first"), "include": ["up_proj"], **settings})
    twofold.compress(second, tmp_path / "second", quiet=True)
    model = load_model(str(tmp_path / "second")).model
    assert {layer.basis.name.split("-")[-1] for layer in shared_layers(model).values()} == {"q_proj", "up_proj"}
    plan = Plan.load(tmp_path / "second" / "plan.json")
    assert {entry.kind for entry in plan.entries} == {"up_proj"} and plan.keep <= 0.6
    assert plan.model_after == sum(p.numel() for p in model.parameters())


def test_distilled_with_its_bases(tmp_path):
    plain, model = shared_model(), shared_model(refine=["distill"], refine_steps=4, refine_rate=1e-3)
    learned = trainable(model)
    assert {name for name in learned if BASES in name} and all(".reduce." in n or ".expand." in n for n in learned)
    notes = " ".join(model.twofold_plan.notes)
    assert "refined" not in notes and "taken back" not in notes
    changed = {name for name, p in plain.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert changed == set(learned)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def spoil(task):
    """A refinement that does harm: it doubles every number that may be trained."""
    before = task.divergence()
    with torch.no_grad():
        for parameter in trainable(task.model).values():
            parameter.mul_(2)
    return Refined(
        method="distill", steps=1, planned=1, tokens=1, parameters=1, seconds=0.0, unit="nats", loss_before=before,
        loss_after=task.divergence(), ended="all steps were done",
    )  # fmt: skip


def test_what_does_harm_is_taken_back_with_the_bases(tmp_path, monkeypatch):
    monkeypatch.setitem(REFINEMENTS._methods, "distill", replace(REFINEMENTS.get("distill"), run=spoil))
    plain, model = shared_model(), shared_model(refine=["distill"])
    assert torch.equal(logits(model), logits(plain))
    for layer in shared_layers(model).values():
        assert layer.basis is model.model.twofold_bases[layer.basis.name]
    states = [one.state_dict() for one in (plain, model)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))


@pytest.mark.long
def test_a_search_and_a_comparison_leave_no_basis_behind(checkpoint, text_file, tmp_path):
    model = shared_model(perplexity_at_most="1.3x", eval_windows=1, tokens=128)
    assert any("searched for" in note for note in model.twofold_plan.notes)
    held = getattr(model.model, BASES, {})
    assert set(held) == {layer.basis.name for layer in shared_layers(model).values()}
    assert sum(p.numel() for p in model.parameters()) == model.twofold_plan.model_after
    table = twofold.compare(
        {
            "model": str(checkpoint), "keep": [0.7], "objectives": ["basis-sharing", "svd-llm"],
            "allocate": ["energy", "uniform", "global"], "calibration": [str(text_file)], "tokens": 128, "window": 32,
            "eval_windows": 1, "baselines": [], "share_blocks": 2,
        },
        tmp_path / "arena", quiet=True,
    )  # fmt: skip
    rows = [row for row in table.rows if row.kind == "factored"]
    assert len(rows) == 6 and [(r.objective, r.allocate) for r in rows if r.skipped] == [("basis-sharing", "energy")]
    shared, plain = (
        next(r for r in rows if (r.objective, r.allocate) == (o, "uniform")) for o in ("basis-sharing", "svd-llm")
    )
    assert 0.6 < shared.keep <= 0.7 and shared.perplexity != plain.perplexity


def test_what_does_not_go_together_is_refused(checkpoint, text_file):
    with pytest.raises(twofold.TwofoldError, match="`allocate=energy` looks at the spectrum of each weight alone"):
        shared_model(allocate="energy")
    for name in ("blockwise", "anchored"):
        with pytest.raises(
            twofold.TwofoldError, match=f"`refine={name}` works on weights that are products of two of their own"
        ):
            shared_model(refine=[name])
    with pytest.raises(twofold.TwofoldError, match=r"`share_blocks`: .*greater than or equal to 1, got 0"):
        shared_model(share_blocks=0)
    settings = {"keep": 0.6, "objective": "basis-sharing", "calibration": [str(text_file)], "stream": "always"}
    with pytest.raises(
        twofold.TwofoldError, match="`objective=basis-sharing` works on a model that is whole in memory"
    ):
        twofold.compress(make_recipe({"model": str(checkpoint), **settings}), checkpoint.parent / "out", quiet=True)
