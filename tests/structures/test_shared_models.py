"""Whole models whose blocks share bases: every architecture, other heads, dtypes, shards and places, and what is counted."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

from bases import IDS, deep, logits, shared_layers, shared_model
from conftest import ARCHITECTURES, VOCABULARY, make_model, make_tokenizer
from twofold.adapters.extract import extract
from twofold.checkpoint.plugin import FORMAT_VERSION
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import BASES
from twofold.refine.steps.training import trainable
from twofold.tuning.estimate import estimate
from twofold.tuning.settings import make_settings


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_of_every_architecture(architecture, form, tmp_path):
    model = shared_model(architecture, form=form, allocate="uniform")
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
    stored = load_file(tmp_path / "model.safetensors")
    assert plan.bytes_after == sum(t.numel() * t.element_size() for t in stored.values())
    floats = sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert floats == plan.model_after + len(entries)  # and a guard each
    assert sum(BASES in name for name in stored) == len(bases) * (2 if form == "gauge" else 1)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == FORMAT_VERSION
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
    shared_model().model.save_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "base")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not [name for name in report["missing_keys"] if BASES in name]
    layers = shared_layers(model).values()
    assert layers and {layer.basis for layer in layers} == set(model.model.twofold_bases.values())


def test_heads_dtypes_shards_and_places(tmp_path):
    model = shared_model(allocate="uniform")
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
        vocab_size=VOCABULARY + 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model = shared_model(BertForMaskedLM(config).eval(), allocate="uniform")
    assert {name.split(".")[-2] for name in shared_layers(model)} == {"self", "intermediate"}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(BertForMaskedLM.from_pretrained(tmp_path)), logits(model))


def test_narrow_models_in_memory_are_what_is_reloaded(tmp_path):
    model = shared_model(make_model("opt", dtype=torch.bfloat16), allocate="uniform")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()) and model.twofold_plan.element_bytes == 2
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_gradients_reach_the_basis_from_all_its_layers():
    model = shared_model(allocate="uniform")
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
    model = shared_model()
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
    model = shared_model(deep(), share_blocks=2, allocate="uniform")
    plan = model.twofold_plan
    alone = {e.name.split(".")[2]: e for e in plan.entries if e.kind == "q_proj" and e.basis is None}
    assert set(alone) == {"4"} and "on a basis of its own: no block is left" in alone["4"].reason
    assert any(note.startswith("5 weights have a basis of their own: no block is left") for note in plan.notes)
    assert isinstance(model.get_submodule("model.layers.4.self_attn.q_proj"), FactoredLinear)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    three = shared_model(deep(), share_blocks=3).twofold_plan
    assert Counter(e.basis for e in three.entries if e.kind == "up_proj").most_common(1)[0][1] == 3
    assert 0.55 < three.keep <= 0.6


def test_every_rank_is_counted_once():
    model = shared_model(deep(), share_blocks=4, allocate="uniform")
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
        shared_model(share_blocks=1, allocate="uniform", objective=o).twofold_plan for o in ("basis-sharing", "svd-llm")
    )
    assert not any(entry.basis for entry in own.entries)
    for mine, theirs in zip(own.entries, other.entries, strict=True):
        assert (mine.name, mine.rank, mine.numbers_after) == (theirs.name, theirs.rank, theirs.numbers_after)
        assert mine.predicted_loss == pytest.approx(theirs.predicted_loss, rel=1e-3)


def test_the_whole_is_the_original():
    assert torch.equal(logits(shared_model(keep=1.0)), logits(make_model()))
