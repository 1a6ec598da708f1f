"""Factored checkpoints load through plain transformers, bit for bit, in every way that models are loaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    pipeline,
)

import tiny
import twofold
from conftest import ARCHITECTURES, TEXT, make_model, make_tokenizer
from twofold import FactoredLinear

IDS = torch.arange(20)[None]


def factorized(architecture="llama", keep=0.6, **settings):
    settings = {"texts": [TEXT], "tokens": 64, "window": 32, "quiet": True} | settings
    return twofold.factorize(make_model(architecture), make_tokenizer(), keep=keep, **settings)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_of_every_architecture(architecture, tmp_path):
    model = factorized(architecture)
    layers = [m for m in model.modules() if isinstance(m, FactoredLinear)]
    assert len(layers) > 5
    assert sum(m.numbers for m in layers) == sum(e.numbers_after for e in model.twofold_plan.entries if e.rank)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) and not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))
    # Saved again, it is the same again.
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_rank_is_the_original(architecture):
    original = logits(make_model(architecture))
    for allocate in ("uniform", "global"):
        model = factorized(architecture, keep=1.0, allocate=allocate)
        if allocate == "uniform":  # rectangles are really factored; a square at full rank is dense
            assert any(isinstance(m, FactoredLinear) for m in model.modules())
        error = (logits(model) - original).norm() / original.norm()
        assert error < 1e-4, (architecture, allocate)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dequantize_gives_the_dense_model(architecture, tmp_path):
    model = factorized(architecture)
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    before = logits(loaded)
    dense = loaded.dequantize()
    assert not any(isinstance(m, FactoredLinear) for m in dense.modules())
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), before, rtol=1e-4, atol=1e-4
    )
    # In memory, without a detour over the disk, too.
    torch.testing.assert_close(logits(model.dequantize()), before, rtol=1e-4, atol=1e-4)


def test_auto_classes_dtypes_and_devices(tmp_path):
    model = factorized()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    hidden = model.model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(base(input_ids=IDS).last_hidden_state, hidden)
    base.save_pretrained(tmp_path / "base")
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path / "base")(input_ids=IDS).last_hidden_state, hidden)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # from the base model's names
    torch.testing.assert_close(logits(again), logits(model))
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier(input_ids=IDS).logits.shape == (1, 3)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow.model.layers[0].mlp.up_proj.reduce.weight.dtype == torch.bfloat16
    assert narrow.model.layers[0].mlp.up_proj.order.dtype == torch.int32
    assert (narrow.dtype, torch.isfinite(logits(narrow)).all()) == (torch.bfloat16, True)
    for device_map in (
        "cpu",
        "auto",
        {
            "model.embed_tokens": "cpu",
            "lm_head": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
        },
    ):
        placed = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=str(tmp_path / "off")
        )
        torch.testing.assert_close(logits(placed), logits(model))


def test_generate_and_pipeline(tmp_path):
    model = factorized()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    made = pipeline("text-generation", model=str(tmp_path), device="cpu")(
        "The castle", max_new_tokens=5, do_sample=False
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = model.generate(**tokenizer("The castle", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert made[0]["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_the_file_is_smaller_by_what_was_saved(tmp_path):
    make_model().save_pretrained(tmp_path / "dense")
    model = factorized()
    model.save_pretrained(tmp_path / "small")
    stored = {}
    for folder in ("dense", "small"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            stored[folder] = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    floats = {f: sum(t.numel() for t in tensors.values() if t.is_floating_point()) for f, tensors in stored.items()}
    plan = model.twofold_plan
    guards = sum(e.rank is not None for e in plan.entries)
    assert floats["dense"] - floats["small"] == plan.target_before - plan.target_after - guards
    assert abs(plan.keep - 0.6) < 0.005
    assert plan.model_after == floats["small"] - guards
    integers = sum(t.numel() for t in stored["small"].values() if not t.is_floating_point())
    assert integers == plan.order_numbers
    assert plan.bytes_after == sum(t.numel() * t.element_size() for t in stored["small"].values())


def test_a_plan_that_does_not_fit_is_refused(tmp_path):
    factorized().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    good = dict(modules)

    def load(changed):
        config["quantization_config"]["modules"] = changed
        (tmp_path / "config.json").write_text(json.dumps(config))
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    with pytest.raises(
        twofold.TwofoldError, match=r"factorizes model\.layers\.9\.up_proj, which LlamaForCausalLM does not have"
    ):
        load({**good, "model.layers.9.up_proj": {"rank": 3, "form": "rows"}})
    name = next(iter(good))
    with pytest.raises(twofold.TwofoldError, match="does not fit"):
        load({**good, name: {"rank": 999, "form": "rows"}})
    with pytest.raises((RuntimeError, twofold.TwofoldError), match="mismatch"):
        load({**good, name: {**good[name], "rank": good[name]["rank"] - 1}})
    config["quantization_config"]["format_version"] = 99
    with pytest.raises(twofold.TwofoldError, match="format version 99"):
        load(good)


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_an_encoder_with_a_masked_head(allocate, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=265, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    settings = {"keep": 0.7, "texts": [TEXT], "tokens": 64, "window": 32, "quiet": True, "allocate": allocate}
    factored = twofold.factorize(model, tiny.tokenizer(), **settings)
    factored.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(factored))
    base = AutoModel.from_pretrained(tmp_path)  # without the masked head, whose own layer is factored
    torch.testing.assert_close(base(input_ids=IDS).last_hidden_state, factored.bert(input_ids=IDS).last_hidden_state)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)(input_ids=IDS).logits.shape == (
        1,
        3,
    )


def test_narrow_models_in_memory_are_what_is_reloaded(tmp_path):
    model = make_model(dtype=torch.bfloat16)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float()
    factored = twofold.factorize(model, make_tokenizer(), keep=0.6, texts=[TEXT], tokens=64, window=32, quiet=True)
    assert factored.dtype == torch.bfloat16 and factored.model.rotary_emb.inv_freq.dtype == torch.float32
    factored.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    factored.model.rotary_emb.inv_freq.copy_(loaded.model.rotary_emb.inv_freq)
    assert frequencies.shape == loaded.model.rotary_emb.inv_freq.shape
    assert torch.equal(logits(loaded), logits(factored))


def test_a_factor_that_is_missing_is_not_made_up(tmp_path):
    factorized().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith(".expand.weight"))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(twofold.TwofoldError, match=f"lacks 1 factors, first {gone}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_factored_checkpoint_that_lacks_a_shard(tmp_path):
    factorized().save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(OSError, match="model-0000"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_training_mode_and_gradients_survive():
    model = factorized()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.reduce.weight.grad is not None and layer.expand.weight.grad is not None
