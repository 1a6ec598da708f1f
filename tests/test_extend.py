"""Whoever adds a method, a format, a layer, a task or a kind of weight writes one file, outside of the package."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForNextSentencePrediction

import tiny
import twofold
import twofold.extend
from conftest import make_model, make_tokenizer
from twofold.allocate import ALLOCATIONS
from twofold.exports.formats import FORMATS
from twofold.model.kinds import KINDS
from twofold.nn.compact import LAYERS
from twofold.nn.places import replace_module
from twofold.objectives import OBJECTIVES
from twofold.recipe import make_recipe
from twofold.refine import REFINEMENTS
from twofold.task import TASKS, find_task

FILE = Path(__file__).parent / "outside" / "addition.py"
REGISTRIES = (OBJECTIVES, ALLOCATIONS, REFINEMENTS, FORMATS, LAYERS, TASKS, KINDS)


@pytest.fixture
def addition(monkeypatch):
    """Import the file of somebody else's; what it registers is gone after the test."""
    for registry in REGISTRIES:
        registry.all()
        monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    spec = importlib.util.spec_from_file_location("addition", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "addition", module)
    spec.loader.exec_module(module)
    return module


def run(checkpoint, text_file, **settings):
    return twofold.factorize(
        str(checkpoint),
        calibration=text_file,
        tokens=256,
        window=32,
        eval_windows=0,
        quiet=True,
        **{"keep": 0.6, **settings},
    )


def test_an_objective(addition, checkpoint, text_file):
    ours, theirs = (run(checkpoint, text_file, objective=name) for name in ("svd-llm", "outside"))
    for name, layer in ours.named_modules():
        if isinstance(layer, twofold.FactoredLinear):
            torch.testing.assert_close(layer.to_dense(), theirs.get_submodule(name).to_dense(), rtol=1e-3, atol=1e-4)
    assert theirs.twofold_plan.objective == "outside" and theirs.twofold_plan.loss_unit == "output"


def test_an_allocation_with_a_setting(addition, checkpoint, text_file):
    plan = run(checkpoint, text_file, allocate="outside", generous_first=3).twofold_plan
    assert {entry.rank for entry in plan.entries} == {1}
    with pytest.raises(
        twofold.TwofoldError, match="`generous_first`: input should be greater than or equal to 0, got -1"
    ):
        make_recipe({"model": "m", "keep": 0.5, "generous_first": -1})


@pytest.mark.long
def test_a_refinement(addition, checkpoint, text_file, tmp_path):
    run = twofold.compress(
        str(checkpoint),
        tmp_path / "out",
        keep=0.6,
        refine="outside",
        calibration=text_file,
        tokens=256,
        window=32,
        quiet=True,
    )
    assert [refined.method for refined in run.refinement] == ["outside"]
    assert run.refinement[0].loss_before == run.refinement[0].loss_after > 0


def test_an_export_format(addition, checkpoint, tmp_path):
    exported = twofold.export(str(checkpoint), "outside", tmp_path / "out", quiet=True)
    assert (
        exported.notes == ["read by nobody"] and exported.file_bytes == (tmp_path / "out" / "weights.pt").stat().st_size
    )
    with pytest.raises(twofold.TwofoldError, match="`to=outside` writes float32, got `dtype=bfloat16`"):
        twofold.export(str(checkpoint), "outside", tmp_path / "wide", dtype="bfloat16", quiet=True)


def test_a_storage_layer(addition, tmp_path):
    model = make_model()
    name = "model.layers.0.mlp.up_proj"
    dense = model.get_submodule(name)
    layer = addition.OutsideLinear(dense.in_features, dense.out_features)
    layer.signs.weight.data = dense.weight.detach().sign() * dense.weight.detach().abs().mean()
    replace_module(model, name, layer)
    from twofold.checkpoint.plugin import attach

    attach(model)
    model.save_pretrained(tmp_path / "saved")
    make_tokenizer().save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["modules"]
    assert stored == {name: {"kind": "outside", "form": "signs"}}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert next(w for w in twofold.inspect(str(tmp_path / "saved")).weights if w.name == name).what.startswith(
        "signs, keeps"
    )


@pytest.mark.long
def test_a_task(addition, checkpoint, tmp_path):
    run = twofold.compress(str(checkpoint), tmp_path / "out", task="last-token", keep=0.6, quiet=True)
    assert run.calibration == "drawn rows" and run.calibration_tokens == 24
    assert run.quality is not None and run.quality.factored["divergence"] > 0
    whole = twofold.factorize(str(checkpoint), task="last-token", keep=1.0, eval_windows=0, quiet=True)
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(whole(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_task_whose_samples_are_made_of_records(addition, tmp_path):
    model = tiny.made(BertForNextSentencePrediction, BertConfig(**tiny.BERT))
    assert find_task(model).name == "next-sentence"
    small = twofold.factorize(model, tiny.tokenizer(), keep=0.6, samples=tiny.pairs(), eval_windows=2, quiet=True)
    assert any(entry.rank for entry in small.twofold_plan.entries)
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"text": a, "target": b}) + "\n" for a, b in tiny.pairs()))
    model.save_pretrained(tmp_path / "small")
    tiny.tokenizer().save_pretrained(tmp_path / "small")
    found = twofold.evaluate(str(tmp_path / "small"), data=str(rows), against=str(tmp_path / "small"), quiet=True)
    assert found.task == "next-sentence" and found.samples == 12 and found.models[1].divergence == 0


def test_a_kind_of_weight(addition, text_file):
    model, name = make_model(), "model.layers.1.mlp.up_proj"
    replace_module(model, name, addition.Scaled(model.get_submodule(name)))
    ids = torch.arange(12)[None]
    before = model(ids).logits.detach()
    settings = {"calibration": text_file, "tokens": 256, "window": 32, "eval_windows": 0, "quiet": True}
    factored = twofold.factorize(model, make_tokenizer(), keep=0.6, **settings)
    entry = next(entry for entry in factored.twofold_plan.entries if entry.name == name)
    layer = factored.get_submodule(name)
    assert isinstance(layer, twofold.FactoredLinear) and layer.rank == entry.rank and entry.measured_loss > 0
    assert float((factored(ids).logits.detach() - before).norm() / before.norm()) < 1


def test_the_file_needs_nothing_but_the_public_names():
    imports = [node for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = {node.module for node in imports if node.module.startswith("twofold")}
    assert ours == {"twofold.nn"}
    assert {"objective", "allocation", "refinement", "export_format", "task", "kind", "Compact"} <= set(
        dir(twofold.extend)
    )
    for name in dir(twofold.extend):
        assert getattr(twofold.extend, name) is not None
