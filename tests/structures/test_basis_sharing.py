"""Bases that several blocks share: the layers, the closed form against the published one, who shares, and whole models."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
)

import twofold
from conftest import ARCHITECTURES, TEXT, VOCABULARY, make_model, make_tokenizer
from twofold.adapters.extract import extract
from twofold.calibrate.moments import Moments
from twofold.checkpoint.plugin import FORMAT_VERSION
from twofold.decompose.decompose import Decomposition
from twofold.decompose.spectra import Spectra
from twofold.factor.apply import apply_plan
from twofold.model.load import load_model
from twofold.model.settings import Override
from twofold.model.target import Target, Targets
from twofold.model.weights import find_targets
from twofold.nn.layers._basis import SharedBasis
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.shared import SharedLinear
from twofold.nn.places import BASES, hold_bases, put_back
from twofold.objectives import OBJECTIVES
from twofold.planning.make import make_plan
from twofold.planning.plan import Plan
from twofold.planning.structures import structure_candidate
from twofold.recipe import make_recipe
from twofold.refine import REFINEMENTS, Refined
from twofold.refine.steps.training import trainable
from twofold.run.inspect import inspect
from twofold.run.plan import plan as plan_of
from twofold.structures.shared_basis import CutShared
from twofold.structures.sharing import UNSHARED, alone_notes, share_bases, sharing
from twofold.tuning.estimate import estimate
from twofold.tuning.settings import make_settings

IDS = torch.arange(20)[None]
DAMPING = 1e-2
SHARED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


# --- The layers


def make(form, m=(7, 5), n=9, rank=4):
    """Two layers on one basis, and the weight of each as one matrix."""
    left, right = torch.randn(sum(m), rank, dtype=torch.float64), torch.randn(rank, n, dtype=torch.float64)
    basis, own = SharedBasis.from_factors("b", left, right, form)
    biases = [torch.randn(m[0], dtype=torch.float64), None]
    parts = zip(own.split(m), biases, strict=True)
    layers = [SharedLinear.on(basis, expand, bias) for expand, bias in parts]
    return basis, layers, (left @ right).split(m), biases


@pytest.mark.parametrize("form", ["plain", "auto"])
def test_the_layers(form):
    torch.manual_seed(0)
    basis, layers, weights, biases = make(form)
    assert basis.form == ("shared-plain" if form == "plain" else "shared-columns")
    x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias))
        torch.testing.assert_close(layer.to_dense(), weight)
        (slope,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(slope, weight.sum(0).expand_as(x))
        assert set(layer.state_dict()) == {"expand.weight", "weight", *(["bias"] if bias is not None else [])}
        assert layer.settings() == {"rank": 4, "form": basis.form, "basis": "b"}
    torch.testing.assert_close(layers[0].expand.weight @ basis.matrix(torch.float64), weights[0])
    stored = basis.reduce.weight.numel() + sum(layer.expand.weight.numel() for layer in layers)
    assert (
        stored == basis.numbers + sum(layer.numbers for layer in layers) == 4 * (9 + 12 - (0 if form == "plain" else 4))
    )


def test_what_a_basis_can_not_be():
    with pytest.raises(ValueError, match="between 1 and 8, got 9"):
        SharedBasis("b", 9, 9, "shared-columns")
    assert SharedBasis("b", 9, 9, "shared-plain").numbers == 81
    for rank in (0, 10):
        with pytest.raises(ValueError, match="between 1 and 9"):
            SharedBasis("b", 9, rank)
    with pytest.raises(ValueError, match="the form must be one of shared-plain, shared-columns"):
        SharedBasis("b", 9, 3, "rows")
    basis = SharedBasis("b", 9, 3, "shared-columns")
    assert basis.index_error() is None
    basis.order[0] = 8
    assert basis.index_error() == "order in the checkpoint is no order of its 9 columns"


def test_a_basis_that_is_not_of_full_rank_is_stored_plain():
    torch.manual_seed(0)
    left, right = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    right[2] = 0
    basis, own = SharedBasis.from_factors("b", left, right)
    assert basis.form == "shared-plain" and basis.order is None
    torch.testing.assert_close(own @ basis.matrix(torch.float64), left @ right)


def test_copies_keep_the_link():
    basis, layers, _, _ = make("auto")
    model = nn.ModuleDict({"a": layers[0], "b": layers[1]})
    hold_bases(model)
    assert list(dict(model.named_parameters())) == [
        "a.bias", "a.expand.weight", "b.expand.weight", f"{BASES}.b.reduce.weight",
    ]  # fmt: skip
    whole = copy.deepcopy(model)
    assert whole["a"].basis is whole["b"].basis is getattr(whole, BASES)["b"] is not basis
    together = copy.deepcopy({"a": model["a"], "b": model["b"]})
    assert together["a"].basis is together["b"].basis is not basis
    model["a"] = copy.deepcopy(model["a"])  # alone it has a basis of its own, which no file could hold
    with pytest.raises(ValueError, match="two bases that are called b"):
        hold_bases(model)
    del model["a"], model["b"]
    hold_bases(model)
    assert not hasattr(model, BASES)


def test_dense_layers_that_come_back_take_the_basis_along():
    _, layers, _, _ = make("auto")
    dense = nn.ModuleDict({"a": nn.Linear(9, 7), "b": nn.Linear(9, 5)})
    before = dict(dense.named_modules())
    with put_back(dense, ["a", "b"]):
        dense["a"], dense["b"] = layers
        hold_bases(dense)
        assert hasattr(dense, BASES)
    assert dict(dense.named_modules()) == before


# --- The closed form


def blocks_of(*shapes):
    torch.manual_seed(0)
    return nn.ModuleDict({str(i): nn.Linear(n, m, bias=False, dtype=torch.float64) for i, (m, n) in enumerate(shapes)})


def moments_of(inputs):
    """The moments of layers whose inputs (T, n) are given, each of its own."""
    sums = {}
    for name, x in inputs.items():
        sums |= {f"input/{name}": x.T @ x, f"rows/{name}": torch.tensor(float(len(x)))}
    return Moments(sums, max(map(len, inputs.values())), {}, "")


def target(name, m, n):
    return Target(name, m, n, False, False)


def published(weights, inputs, rank):
    """The method as the paper writes it, step by step: y = x W, weights side by side, S from Cholesky, W ≈ (S⁻¹ U Σ)(Vᵀ)."""
    n = inputs[0].shape[1]
    total = sum(x.T @ x for x in inputs)
    total = total + DAMPING * total.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    s = torch.linalg.cholesky(total)  # S Sᵀ = Σ XᵀX
    beside = torch.cat([weight.T for weight in weights], 1)  # (n, Σm)
    u, sigma, vh = torch.linalg.svd(s.T @ beside, full_matrices=False)
    basis = torch.linalg.solve(s.T, u[:, :rank] * sigma[:rank])  # (n, r)
    coefficients = vh[:rank].split([len(weight) for weight in weights], 1)
    return [(basis @ own).T for own in coefficients], float(sigma[rank:].square().sum())


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("tokens", [(50, 50), (60, 20)])
@pytest.mark.parametrize("shape", [(4, 13), (10, 13), (16, 11)])  # stacked: wide, tall, tall by themselves
def test_the_loss_and_the_weights_are_the_published_ones(shape, tokens, form):
    m, n = shape
    block = blocks_of(shape, shape)
    inputs = {
        str(i): torch.randn(t, n, dtype=torch.float64) * torch.linspace(0.2, 2 + i, n) for i, t in enumerate(tokens)
    }
    structure = sharing([target("0", m, n), target("1", m, n)], form)
    cut = CutShared(structure, block, moments_of(inputs), DAMPING)
    weights = [block[name].weight.detach() for name in ("0", "1")]
    largest = structure.units - 1
    assert largest == (min(2 * m, n) - 1 if form == "gauge" else (2 * m * n - 1) // (2 * m + n))
    for rank in (1, largest // 2, largest):
        made, measured = cut.layers(rank, torch.float64)
        wanted, loss = published(weights, list(inputs.values()), rank)
        for name, weight in zip(("0", "1"), wanted, strict=True):
            torch.testing.assert_close(made[name].to_dense(), weight, rtol=1e-7, atol=1e-9)
        loss /= sum(tokens)  # the paper sums over tokens
        assert measured == pytest.approx(loss, rel=1e-6, abs=1e-12)
        assert float(cut.losses[rank]) == pytest.approx(loss, rel=1e-6, abs=1e-12)
        basis = made["0"].basis
        assert basis is made["1"].basis and basis.form == ("shared-columns" if form == "gauge" else "shared-plain")
        stored = basis.numbers + made["0"].numbers + made["1"].numbers
        assert stored == rank * (n + 2 * m - (rank if form == "gauge" else 0)) < 2 * m * n


def stacked(*weights):
    """Two layers of these weights, as targets on one basis, with the moments of some inputs."""
    block = blocks_of(*(weight.shape for weight in weights))
    with torch.no_grad():
        for layer, weight in zip(block.values(), weights, strict=True):
            layer.weight.copy_(weight)
    found = [target(name, *weight.shape) for name, weight in zip(block, weights, strict=True)]
    x = torch.randn(40, weights[0].shape[1], dtype=torch.float64)
    return block, Targets(found, [], structures=(sharing(found, "gauge"),)), moments_of(dict.fromkeys(block, x))


UNIFORM = make_recipe({"model": "m", "keep": 0.95, "objective": "basis-sharing", "allocate": "uniform"})


def test_without_a_bounded_form_plain_factors_take_no_more_storage():
    block, targets, moments = stacked(torch.zeros(6, 12), torch.zeros(6, 12))
    plan = make_plan("m", targets, None, UNIFORM, 8)
    assert {(entry.rank, entry.form) for entry in plan.entries} == {(9, "shared-columns")}
    done, replaced = apply_plan(
        block, plan, Decomposition(moments, OBJECTIVES.get("basis-sharing"), DAMPING, Spectra()), torch.float64,
        structures=targets.structures, quiet=True,
    )  # fmt: skip
    assert {(e.rank, e.form) for e in done.entries} == {(5, "shared-plain")} and len(
        replaced
    ) == 2  # 9 · (24 − 9) // 24
    assert done.target_after == 5 * 24 == sum(p.numel() for p in block.parameters()) <= plan.target_after
    assert done.order_numbers == 0 and sum("no bounded gauge form" in note for note in done.notes) == 2
    assert torch.equal(block["0"](torch.ones(3, 12, dtype=torch.float64)), torch.zeros(3, 6, dtype=torch.float64))


def test_no_rank_is_chosen_that_the_weights_have_not():
    weight = torch.randn(6, 12, dtype=torch.float64)
    block, targets, moments = stacked(weight, weight)  # of rank 6 together
    losses = CutShared(targets.structures[0], block, moments, DAMPING).losses
    plan = make_plan("m", targets, {"1": (losses[:-1] - losses[1:]).numpy()}, UNIFORM, 8)
    assert {entry.rank for entry in plan.entries} == {6}


# --- Which weights share


def deep(layers=5, **settings):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=256, eos_token_id=257, pad_token_id=258, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def groups_of(model, blocks, kind, overrides=None, **patterns):
    """The blocks that share a basis for the weights of one kind, and why those that are alone are."""
    structures = share_bases(find_targets(model, **patterns), "gauge", blocks, overrides or {})
    found = [s for s in structures if s.targets[0].kind == kind]
    assert all(bool(s.basis) == (len(s.targets) > 1) == (not s.why) for s in found)
    return [([t.layer for t in s.targets], s.why) for s in found]


def test_blocks_in_a_row_share_and_what_is_left_over_is_alone():
    model, left = deep(), "no block is left to share it with"
    assert groups_of(model, 2, "q_proj") == [([0, 1], ""), ([2, 3], ""), ([4], left)]
    assert groups_of(model, 3, "up_proj") == [([0, 1, 2], ""), ([3, 4], "")]
    assert groups_of(model, 9, "v_proj") == [([0, 1, 2, 3, 4], "")]
    alone = groups_of(model, 1, "k_proj")
    assert alone == [([i], "each block was to have its own") for i in range(5)]
    for kind in ("o_proj", "down_proj"):
        assert {why for _, why in groups_of(model, 2, kind)} == {
            "what gives the output of an attention or an MLP is not shared"
        }
    assert {"o_proj", "down_proj", "fc2", "c_proj", "out_proj", "dense_4h_to_h"} <= UNSHARED and not UNSHARED & set(
        SHARED
    )
    notes = alone_notes(share_bases(find_targets(model), "gauge", 2, {}))
    assert notes == [
        "10 weights have a basis of their own: what gives the output of an attention or an MLP is not shared",
        f"5 weights have a basis of their own: {left}",
    ]  # fmt: skip


def test_what_is_excluded_overridden_or_of_another_shape_shares_with_no_one():
    model = deep()
    dense = "the others of its kind in its blocks stay dense"
    assert groups_of(model, 2, "q_proj", exclude=["*.1.self_attn.q_proj"])[0] == ([0], dense)
    assert groups_of(model, 3, "q_proj", exclude=["*.1.self_attn.q_proj"])[0] == ([0, 2], "")
    one = {"*.0.mlp.up_proj": Override(keep=0.5)}
    assert groups_of(model, 2, "up_proj", one)[:3] == [
        ([0], "an override holds for it or for the others"), ([1], "an override holds for it or for the others"), ([2, 3], ""),
    ]  # fmt: skip
    assert groups_of(model, 2, "up_proj", {"up_proj": Override(keep=0.5)})[0] == ([0, 1], "")
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 40, bias=False)
    assert groups_of(model, 2, "up_proj")[:2] == [
        ([0], "the others have another shape"),
        ([1], "the others have another shape"),
    ]
    outside = nn.ModuleDict({"first": nn.Linear(16, 16), "second": nn.Linear(16, 16)})
    assert {why for _, why in groups_of(outside, 2, "first")} == {"it stands in no block"}
    bert = nn.ModuleList(
        nn.ModuleDict({name: nn.ModuleDict({"dense": nn.Linear(16, 16)}) for name in ("intermediate", "output")})
        for _ in range(2)
    )
    assert [len(blocks) for blocks, _ in groups_of(bert, 2, "dense")] == [2, 1, 1]


def test_what_the_text_does_not_call_leaves_the_others_together():
    model = deep()
    targets = find_targets(model)
    found = Targets(targets.targets, targets.dense, structures=tuple(share_bases(targets, "gauge", 3, {})))
    q = "model.layers.{}.self_attn.q_proj".format
    for gone, left in (([1], [[0, 2], [3, 4]]), ([0, 1], [[2], [3, 4]]), ([0, 1, 2], [[3, 4]])):
        rest = found.without({q(i): "not called" for i in gone})
        shared = [s for s in rest.structures if s.targets[0].kind == "q_proj"]
        assert [[t.layer for t in s.targets] for s in shared] == left
        assert {d.name for d in rest.dense if d.reason == "not called"} == {f"{q(i)}.weight" for i in gone}
        assert {m.name for s in rest.structures for m in s.members} == {t.name for t in rest.targets}
    alone = next(s for s in found.without({q(3): "not called"}).structures if s.name == q(4))
    assert alone.why == "the others of its kind in its blocks stay dense" and alone.units == 32


# --- Whole models


def cut(model="llama", keep=0.6, **settings):
    settings = {"texts": [TEXT], "tokens": 256, "window": 32, "quiet": True, "objective": "basis-sharing"} | settings
    if not settings.keys() & {"budget", "kl_at_most", "perplexity_at_most"}:
        settings["keep"] = keep
    return twofold.factorize(make_model(model) if isinstance(model, str) else model, make_tokenizer(), **settings)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def shared_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SharedLinear)}


def stored_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_of_every_architecture(architecture, form, tmp_path):
    model = cut(architecture, form=form, allocate="uniform")
    plan, shared = model.twofold_plan, shared_layers(model)
    entries = {entry.name: entry for entry in plan.entries}
    assert {name for name, entry in entries.items() if entry.basis} == set(shared)
    assert 4 <= len(shared) < len(entries) and all(entry.rank for entry in plan.entries)
    bases = {id(layer.basis) for layer in shared.values()}
    assert (
        2 * len(bases) == len(shared) == sum(Counter(entry.basis for entry in entries.values() if entry.basis).values())
    )
    for name, layer in shared.items():
        entry = entries[name]
        assert (entry.rank, entry.form, entry.basis) == (layer.rank, layer.form, layer.basis.name)
        assert entry.reason.endswith("on a basis for 2 blocks")
    assert all(e.measured_loss == pytest.approx(e.predicted_loss, rel=1e-2) for e in plan.entries)
    assert 0.5 < plan.keep <= 0.6
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))
    stored = stored_in(tmp_path)
    assert plan.bytes_after == sum(t.numel() * t.element_size() for t in stored.values())
    floats = sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert floats == plan.model_after + len(entries)  # and a guard each
    assert sum(BASES in name for name in stored) == len(bases) * (2 if form == "gauge" else 1)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(IDS)[0], model.base_model(IDS)[0])
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], base(IDS)[0])
    before = logits(loaded)
    dense = loaded.dequantize()
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)
    assert not hasattr(dense.base_model, BASES) and not any(BASES in name for name in dense.state_dict())


def test_a_base_model_with_a_basis_gets_a_head(tmp_path):
    cut().model.save_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "base")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not [name for name in report["missing_keys"] if BASES in name]
    layers = shared_layers(model).values()
    assert layers and {layer.basis for layer in layers} == set(model.model.twofold_bases.values())


def test_heads_dtypes_shards_and_places(tmp_path):
    model = cut(allocate="uniform")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert shared_layers(classifier) and classifier(input_ids=IDS).logits.shape == (1, 3)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    first = next(iter(shared_layers(narrow).values()))
    assert (first.basis.reduce.weight.dtype, first.basis.order.dtype) == (torch.bfloat16, torch.int32)
    assert torch.isfinite(logits(narrow)).all()
    parts = dict.fromkeys(["model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"], "cpu")
    blocks = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    for device_map in (
        "auto",
        {**parts, **blocks, f"model.{BASES}": "cpu"},
        {**parts, "model.layers": "cpu", f"model.{BASES}": "disk"},
    ):
        placed = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=str(tmp_path / "off")
        )
        torch.testing.assert_close(logits(placed), logits(model))


def test_an_encoder_with_a_masked_head(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model = cut(BertForMaskedLM(config).eval(), allocate="uniform")
    assert {name.split(".")[-2] for name in shared_layers(model)} == {"self", "intermediate"}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(BertForMaskedLM.from_pretrained(tmp_path)), logits(model))


def test_narrow_models_in_memory_are_what_is_reloaded(tmp_path):
    model = cut(make_model("opt", dtype=torch.bfloat16), allocate="uniform")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()) and model.twofold_plan.element_bytes == 2
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_gradients_reach_the_basis_from_all_its_layers():
    model = cut(allocate="uniform")
    model(input_ids=IDS, labels=IDS).loss.backward()
    layers = list(shared_layers(model).values())
    assert all(layer.basis.reduce.weight.grad is not None and layer.expand.weight.grad is not None for layer in layers)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for basis in other.model.twofold_bases.values():
            basis.reduce.weight.zero_()
    assert not torch.equal(logits(other), logits(model))
    assert all(layer.basis.reduce.weight.any() for layer in layers)


def test_a_basis_is_of_the_layers_that_are_tuned_and_extracted(tmp_path):
    model = cut()
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        for part in trainable(model).values():
            part.data += 0.05 * part.data.std() * torch.randn(part.shape)
    settings = make_settings({"model": str(tmp_path / "base"), "data": ["rows.jsonl"], "method": "factors"})
    factors = sum(p.numel() for name, p in trainable(model).items() if not name.endswith(".bias"))
    assert estimate(settings, longest=16, mean=16.0, steps=1, speed=1e9).trainable == factors
    found = extract(str(tmp_path / "tuned"), str(tmp_path / "base"), tmp_path / "adapter", energy=0.9, quiet=True)
    assert found.ranks and not found.notes  # the bases are in the layers' change


def test_many_blocks_and_one_left_over(tmp_path):
    model = cut(deep(), share_blocks=2, allocate="uniform")
    plan = model.twofold_plan
    alone = {e.name.split(".")[2]: e for e in plan.entries if e.kind == "q_proj" and e.basis is None}
    assert set(alone) == {"4"} and "on a basis of its own: no block is left" in alone["4"].reason
    assert any(note.startswith("5 weights have a basis of their own: no block is left") for note in plan.notes)
    assert isinstance(model.get_submodule("model.layers.4.self_attn.q_proj"), FactoredLinear)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    three = cut(deep(), share_blocks=3).twofold_plan
    assert Counter(e.basis for e in three.entries if e.kind == "up_proj").most_common(1)[0][1] == 3
    assert 0.55 < three.keep <= 0.6


def test_every_rank_is_counted_once():
    model = cut(deep(), share_blocks=4, allocate="uniform")
    entries = [e for e in model.twofold_plan.entries if e.basis]
    for name in {e.basis for e in entries}:
        group = [e for e in entries if e.basis == name]
        rank, n, rows = group[0].rank, group[0].in_features, sum(e.out_features for e in group)
        assert len(group) == 4 and sum(e.numbers_after for e in group) == rank * (n + rows - rank)
        assert max(e.numbers_after for e in group) - min(e.numbers_after for e in group) <= 1
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == model.twofold_plan.model_after


def test_one_block_each_is_svd_llm():
    own, other = (
        cut(share_blocks=1, allocate="uniform", objective=o).twofold_plan for o in ("basis-sharing", "svd-llm")
    )
    assert not any(entry.basis for entry in own.entries)
    for mine, theirs in zip(own.entries, other.entries, strict=True):
        assert (mine.name, mine.rank, mine.numbers_after) == (theirs.name, theirs.rank, theirs.numbers_after)
        assert mine.predicted_loss == pytest.approx(theirs.predicted_loss, rel=1e-3)


def test_the_whole_is_the_original():
    original = logits(make_model())
    assert torch.equal(logits(cut(keep=1.0)), original)
    for shape, full in (((4, 13), 8), ((16, 11), 11)):  # and so is the closed form, at full rank
        weights = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
        block, _, moments = stacked(*weights)
        plain = sharing([target("0", *shape), target("1", *shape)], "plain")
        made, lost = CutShared(plain, block, moments, DAMPING).layers(full, torch.float64)
        assert lost < 1e-12
        for name, weight in zip(("0", "1"), weights, strict=True):
            torch.testing.assert_close(made[name].to_dense(), weight)


def test_budgets_overrides_and_multiples():
    plan = cut(
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
        small = cut(budget="70KB", form=form).twofold_plan
        assert 66_000 < small.bytes_after <= 70_000


@pytest.mark.parametrize("form", ["gauge", "plain"])
def test_what_a_rank_costs_in_bytes(form):
    targets = [target(str(i), 20, 30) for i in range(3)]
    structure, rank = sharing(targets, form), 7
    recipe = make_recipe({"model": "m", "budget": "9KB", "objective": "basis-sharing", "form": form})
    found = Targets(targets, [], structures=(structure,))
    candidate = structure_candidate(found, structure, np.zeros(structure.units + 1), recipe, 4, True, 1.0)
    (cost,) = candidate.costs[candidate.ranks == rank]
    recipe = recipe.model_copy(update={"overrides": {"*": Override(rank=rank)}})
    plan = make_plan("m", found, {structure.name: np.zeros(structure.units)}, recipe, 4)
    numbers, order = (7 * (30 + 60 - 7), 30) if form == "gauge" else (7 * 90, 0)
    assert cost == plan.bytes_after == 4 * (numbers + order + 3)  # and a guard in each layer
    once = 7 * (30 + 20 - 7) if form == "gauge" else 7 * 50
    assert [e.multiplications for e in plan.entries] == [once] * 3 and plan.multiplications_after == 3 * once


def test_a_basis_counts_as_many_layers_as_it_serves():
    pair, one = [target(f"{i}.a", 32, 32) for i in range(2)], target("b", 64, 32)
    targets = Targets([*pair, one], [], structures=(sharing(pair, "gauge"), sharing([one], "gauge", "alone")))
    values = np.linspace(1, 0.01, 32)  # the same of both, which cost the same too
    recipe = make_recipe({"model": "m", "keep": 0.6, "objective": "basis-sharing"})
    ranks = [e.rank for e in make_plan("m", targets, {"1.a": values, "b": values}, recipe, 4).entries]
    assert ranks[0] == ranks[1] > ranks[2]


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
    stored = stored_in(tmp_path / "out")
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
    plain, model = cut(), cut(refine=["distill"], refine_steps=4, refine_rate=1e-3)
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
    plain, model = cut(), cut(refine=["distill"])
    assert torch.equal(logits(model), logits(plain))
    for layer in shared_layers(model).values():
        assert layer.basis is model.model.twofold_bases[layer.basis.name]
    states = [one.state_dict() for one in (plain, model)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))


def test_a_search_and_a_comparison_leave_no_basis_behind(checkpoint, text_file, tmp_path):
    model = cut(perplexity_at_most="1.3x", eval_windows=1, tokens=128)
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
    with pytest.raises(twofold.TwofoldError, match="--allocate energy looks at the spectrum of each weight alone"):
        cut(allocate="energy")
    for name in ("blockwise", "anchored"):
        with pytest.raises(
            twofold.TwofoldError, match=f"{name} works on weights that are products of two of their own"
        ):
            cut(refine=[name])
    with pytest.raises(twofold.TwofoldError, match=r"--share-blocks: .*greater than or equal to 1, got 0"):
        cut(share_blocks=0)
    settings = {"keep": 0.6, "objective": "basis-sharing", "calibration": [str(text_file)], "stream": "always"}
    with pytest.raises(
        twofold.TwofoldError, match="--objective basis-sharing works on a model that is whole in memory"
    ):
        twofold.compress(make_recipe({"model": str(checkpoint), **settings}), checkpoint.parent / "out", quiet=True)


# --- Broken checkpoints


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    cut(allocate="uniform").save_pretrained(folder)
    return folder


def spoiled(sound, tmp_path, modules=None, tensors=None, **settings):
    """A copy of a sound checkpoint with other settings of its layers, or other tensors."""
    config = json.loads((sound / "config.json").read_text())
    config["quantization_config"] |= settings
    if modules is not None:
        modules(config["quantization_config"]["modules"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(sound / "model.safetensors")
    if tensors is not None:
        tensors(weights)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    return tmp_path


QUERY = "model.layers.0.self_attn.q_proj"
BASIS = f"model.{BASES}.model-layers-0-self_attn-q_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"basis": None}, "the name of its basis, without dots, got None"),
        ({"basis": ""}, "the name of its basis, without dots, got ''"),
        ({"basis": "a.b"}, "the name of its basis, without dots, got 'a.b'"),
        ({"basis": ["a"]}, "the name of its basis"),
        ({"basis": 3}, "the name of its basis"),
        ({"rank": 3}, "32 inputs, rank 3 .*in another layer, here it has 32 inputs, rank 15"),
        ({"form": "shared-plain"}, "in another layer, here it has 32 inputs"),
        ({"basis": "model-layers-0-mlp-up_proj", "rank": 2}, "in another layer, here it has 32 inputs, rank 2"),
        ({"form": "rows"}, "the form must be one of|in another layer"),
        ({"form": ["shared-plain"]}, "the form must be one of|in another layer"),
        ({"form": None}, "the form must be one of|in another layer"),
        ({"rank": "9"}, "a whole number as its rank"),
        ({"rank": True}, "a whole number as its rank"),
        ({"columns": 3}, "a whole number as its rank, and a form"),
        ({"rank": 10**12}, "must be between 1 and 31|in another layer"),
        ({"rank": 0}, "must be between 1 and 31|in another layer"),
    ],
)
def test_wrong_settings_are_refused(change, says, sound, tmp_path):
    folder = spoiled(sound, tmp_path, lambda modules: modules[QUERY].update(change))
    with pytest.raises(twofold.TwofoldError, match=rf"the plan of .*q_proj.* does not fit: .*({says})"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(twofold.TwofoldError, match=says):
        load_model(str(folder))


def test_a_layer_without_its_setting_and_an_old_reader(sound, tmp_path):
    folder = spoiled(sound, tmp_path, lambda modules: modules[QUERY].pop("basis"))
    with pytest.raises(twofold.TwofoldError, match="the form must be one of plain, rows, columns"):
        AutoModelForCausalLM.from_pretrained(folder)
    folder = spoiled(sound, tmp_path, format_version=FORMAT_VERSION + 1)
    says = f"format version {FORMAT_VERSION + 1}, this Twofold reads up to {FORMAT_VERSION}; install a newer"
    with pytest.raises(twofold.TwofoldError, match=says):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{BASIS}.reduce.weight"), f"{BASIS}.reduce.weight"),
        (lambda t: t.pop(f"{QUERY}.expand.weight"), f"{QUERY}.expand.weight"),
        (lambda t: t.pop(f"{BASIS}.order"), f"{BASIS}.order"),
        (lambda t: t[f"{BASIS}.order"][:1].fill_(40), f"{BASIS}.order in the checkpoint is no order of its 32 columns"),
        (
            lambda t: t[f"{BASIS}.order"][:1].copy_(t[f"{BASIS}.order"][1:2]),
            f"{BASIS}.order in the checkpoint is no order",
        ),
        (lambda t: t.update({f"{BASIS}.reduce.weight": torch.ones(3, 29)}), f"{BASIS}.reduce"),
        (lambda t: t.update({f"{BASIS}.reduce.weight": t[f"{BASIS}.reduce.weight"].T}), f"{BASIS}.reduce"),
    ],
    ids=["no basis", "no expand", "no order", "order out of range", "order twice", "another rank", "turned"],
)
def test_tensors_that_are_missing_or_wrong_are_refused(change, says, sound, tmp_path):
    folder = spoiled(sound, tmp_path, tensors=change)
    with pytest.raises((twofold.TwofoldError, RuntimeError), match=f"{says}|mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(twofold.TwofoldError, match=says):
        load_model(str(folder))


def test_without_twofold_it_fails_loudly(sound):
    code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(sound)!r}); print('LOADED')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "LOADED" not in done.stdout and "mismatch" in done.stderr.lower()
