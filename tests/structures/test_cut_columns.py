"""Dense columns beside a low rank: the closed form against a direct solution, and whole models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import twofold
from conftest import ARCHITECTURES, TEXT, make_model, make_tokenizer
from twofold.calibrate.moments import Moments
from twofold.linalg.gauge import gauge_storage, plain_storage
from twofold.model.structure import Member, Structure
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.structures.dense_columns import CutColumns

IDS = torch.arange(20)[None]
DAMPING = 1e-3


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("shape", [(12, 70), (70, 64)])
def test_the_loss_is_that_of_the_direct_solution(shape, form):
    torch.manual_seed(0)
    m, n = shape
    block = nn.ModuleDict({"w": nn.Linear(n, m, dtype=torch.float64)})
    with torch.no_grad():
        block["w"].weight[:, [3, 11]] *= 8  # two columns unlike the others
    x = torch.randn(200, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64) / n**0.5
    moments = Moments({"input/w": x.T @ x, "rows/w": torch.tensor(200.0)}, 200, {}, "")
    largest = min(m, n) - 1 if form == "gauge" else (m * n - 1) // (m + n)
    cut = CutColumns(Structure("dense-columns", (Member("w", form, 1),), largest + 1), block, moments, DAMPING)
    c = x.T @ x / 200
    samples = torch.cat([x / 200**0.5, (DAMPING * c.diagonal().mean()) ** 0.5 * torch.eye(n, dtype=torch.float64)]).T
    weight, count = block["w"].weight.detach(), gauge_storage if form == "gauge" else plain_storage
    singular = torch.linalg.svdvals(weight @ samples)
    used = set()
    for units in range(1, largest + 1, max(largest // 6, 1)):
        made, measured = cut.layers(units, torch.float64)
        layer = made["w"]
        assert layer.numbers <= count(m, n, units)
        difference = (weight - layer.to_dense().detach()) @ samples
        assert measured == pytest.approx(float(difference.square().sum()), rel=1e-8)
        columns = layer.columns if isinstance(layer, DenseColumnsLinear) else 0
        used.add(columns)
        known = layer.split[:columns].long() if columns else torch.zeros(0, dtype=torch.int64)
        others = [i for i in range(n) if i not in set(known.tolist())]
        # What the dense inputs do not tell of the others, by projection of the samples.
        q = torch.linalg.qr(samples[known].T).Q
        left = weight[:, others] @ (samples[others] - samples[others] @ q @ q.T)
        best = float(torch.linalg.svdvals(left)[layer.rank :].square().sum())
        assert measured == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert float(cut.losses[units]) == pytest.approx(measured, rel=1e-6, abs=1e-9)
        assert measured <= float(singular[units:].square().sum()) * (1 + 1e-9) + 1e-9
    assert len(used) > 1, "no dense columns were ever chosen"


def cut(architecture="llama", keep=0.6, **settings):
    settings = {"texts": [TEXT], "tokens": 256, "window": 32, "quiet": True, "objective": "dense-columns"} | settings
    return twofold.factorize(make_model(architecture), make_tokenizer(), keep=keep, **settings)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_of_every_architecture(architecture, form, tmp_path):
    model = cut(architecture, form=form)
    plan, layers = model.twofold_plan, {n: m for n, m in model.named_modules() if isinstance(m, FactoredLinear)}
    entries = [e for e in plan.entries if e.rank is not None]
    assert {e.name for e in entries} == set(layers) and any(e.columns for e in entries)
    assert all(layers[e.name].numbers == e.numbers_after and e.form == layers[e.name].form for e in entries)
    assert all(e.measured_loss == pytest.approx(e.predicted_loss, rel=1e-2) for e in entries)
    assert 0.4 < plan.keep <= 0.6
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))
    stored = load_file(tmp_path / "model.safetensors").values()
    assert plan.bytes_after == sum(t.numel() * t.element_size() for t in stored)
    before = logits(loaded)
    torch.testing.assert_close(logits(loaded.dequantize()), before, rtol=1e-4, atol=1e-4)


def test_the_whole_is_the_original():
    model = cut(keep=1.0)
    torch.testing.assert_close(logits(model), logits(make_model()), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_overrides_budgets_and_refusals(tmp_path):
    plan = cut(overrides={"*.0.mlp.up_proj": {"rank": 5}, "*.1.mlp.up_proj": {"dense": True}}).twofold_plan
    by_name = {entry.name: entry for entry in plan.entries}
    forced = by_name["model.layers.0.mlp.up_proj"]
    assert forced.numbers_after <= gauge_storage(80, 32, 5) and forced.reason == "an override says so"
    assert by_name["model.layers.1.mlp.up_proj"].rank is None
    assert cut(keep=None, budget="70KB").twofold_plan.bytes_after <= 70_000
    with pytest.raises(
        twofold.TwofoldError, match="`objective=dense-columns` has none; use `allocate=global` or `allocate=uniform`"
    ):
        cut(allocate="energy")
    cut().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    name = next(n for n, s in modules.items() if "columns" in s)
    modules[name]["columns"] = 999
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(twofold.TwofoldError, match="does not fit: a layer with"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
