"""Weights that are tied, that are not, and configurations that say otherwise: what is written computes what was meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, T5Config, T5ForConditionalGeneration

import twofold
from conftest import TEXT, make_model, make_tokenizer
from twofold.checkpoint.plugin import attach
from twofold.checkpoint.ties import settle_ties

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
IDS = torch.arange(3, 40)[None]


def bert() -> Any:
    config = BertConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


ARCHITECTURES: dict[str, tuple[Callable[[], Any], Any, str, str]] = {
    "llama": (make_model, AutoModelForCausalLM, "lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": (lambda: make_model("gpt2"), AutoModelForCausalLM, "lm_head.weight", "transformer.wte.weight"),
    "bert": (bert, AutoModelForMaskedLM, "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def folder_of(name: str, state: str, place: Path) -> Path:
    """Write a checkpoint whose file and whose config.json say something of the head.

    Args:
        state: "tied"; "both", and they differ; "equal": both, and they are the same; "head": the table is left out; "untied".
    """
    make, _, head, table = ARCHITECTURES[name]
    model = make()
    model.save_pretrained(place)
    tensors = load_file(place / "model.safetensors")
    if state in ("both", "untied"):
        tensors[head] = tensors[table].flip(0).clone()
    elif state == "equal":
        tensors[head] = tensors[table].clone()
    elif state == "head":
        tensors[head] = tensors.pop(table)
    if state == "untied" and name == "bert":
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    config["tie_word_embeddings"] = state != "untied"
    (place / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(place)
    return place


def says_the_truth(folder: Path, head: str, table: str) -> None:
    """Check that a folder's config.json says of the head what its file holds, for readers that take it by its word."""
    names = {name for file in folder.glob("model*.safetensors") for name in load_file(file)}
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False)
    assert tied != {head, table}.issubset(names)


@pytest.mark.parametrize("state", ["tied", "both", "equal", "head", "untied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_computes_what_was_factored(name: str, state: str, tmp_path: Path) -> None:
    _, auto, head, table = ARCHITECTURES[name]
    source = folder_of(name, state, tmp_path / "source")
    settings: dict[str, Any] = {"calibration": "self"} if name != "bert" else {"texts": [TEXT]}
    model = twofold.factorize(
        str(source), keep=0.7, tokens=64, window=16, objective="svd", quiet=True, form="plain", **settings
    )
    meant = logits(model)
    model.save_pretrained(tmp_path / "factored")
    again = auto.from_pretrained(tmp_path / "factored")
    torch.testing.assert_close(logits(again), meant)
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(auto.from_pretrained(tmp_path / "again")), meant)
    again.tie_weights()  # what is written is what it says
    if name != "bert":
        torch.testing.assert_close(logits(again), meant)
    dense = auto.from_pretrained(tmp_path / "factored").dequantize()
    torch.testing.assert_close(logits(dense), meant, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(auto.from_pretrained(tmp_path / "dense")), meant, rtol=1e-4, atol=1e-4)
    twofold.export(str(tmp_path / "factored"), "dense", tmp_path / "exported", check_tokens=2, quiet=True)
    torch.testing.assert_close(logits(auto.from_pretrained(tmp_path / "exported")), meant, rtol=1e-4, atol=1e-4)
    if name != "bert":  # its bias is tied, too, and stays so
        for folder in ("factored", "again", "dense", "exported"):
            says_the_truth(tmp_path / folder, head, table)


@pytest.mark.parametrize("state", ["tied", "both"])
def test_tables_of_integers_compute_what_was_factored(state: str, tmp_path: Path) -> None:
    source = folder_of("llama", state, tmp_path / "source")
    settings: dict[str, Any] = {"keep": 0.7, "bits": 8, "dense_bits": 8, "objective": "svd", "quiet": True}
    model = twofold.factorize(str(source), **settings)
    meant = logits(model)
    model.save_pretrained(tmp_path / "factored")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "factored")
    torch.testing.assert_close(logits(again), meant)
    torch.testing.assert_close(logits(again.dequantize()), meant, rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), meant, rtol=1e-4, atol=1e-4
    )
    says_the_truth(tmp_path / "dense", "lm_head.weight", "model.embed_tokens.weight")


def test_the_portable_form_computes_what_was_factored(tmp_path: Path) -> None:
    from twofold.exports.formats import Source
    from twofold.exports.formats.portable import write_portable
    from twofold.model.load import load_model

    for name in ("llama", "bert"):
        source = folder_of(name, "both", tmp_path / name)
        twofold.factorize(str(source), keep=0.7, objective="svd", quiet=True).save_pretrained(
            tmp_path / f"{name}-small"
        )
        loaded = load_model(str(tmp_path / f"{name}-small"))
        meant = logits(loaded.model)
        (tmp_path / f"{name}-portable").mkdir()
        write_portable(Source(loaded, torch.float32), tmp_path / f"{name}-portable")
        auto = ARCHITECTURES[name][1]
        again = auto.from_pretrained(tmp_path / f"{name}-portable", trust_remote_code=True)
        torch.testing.assert_close(logits(again), meant)


def test_a_plain_model_is_exported_as_it_is(tmp_path: Path) -> None:
    source = folder_of("llama", "both", tmp_path / "source")
    meant = logits(AutoModelForCausalLM.from_pretrained(source))
    twofold.export(str(source), "dense", tmp_path / "exported", check_tokens=2, quiet=True)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "exported")), meant)
    says_the_truth(tmp_path / "exported", "lm_head.weight", "model.embed_tokens.weight")


def test_a_plan_says_what_was_changed_of_the_ties(tmp_path: Path) -> None:
    source = folder_of("llama", "both", tmp_path / "source")
    model = twofold.factorize(str(source), keep=0.7, objective="svd", quiet=True)
    assert any("`tie_word_embeddings: true`" in note and "lm_head.weight" in note for note in model.twofold_plan.notes)
    plain = twofold.factorize(make_model(), keep=0.7, objective="svd", quiet=True)
    assert not any("tie_word_embeddings" in note for note in plain.twofold_plan.notes)


def test_weights_that_are_one_are_said_to_be(tmp_path: Path) -> None:
    model = make_model("mistral")  # not tied
    model.lm_head.weight = model.model.embed_tokens.weight
    attach(model)
    meant = logits(model)
    model.save_pretrained(tmp_path / "one")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "one")), meant)


def test_the_setting_stays_where_the_class_computes_by_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=264, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))

    def outputs(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=IDS, decoder_input_ids=IDS).logits
        return found

    meant = outputs(model)
    settle_ties(model)
    torch.testing.assert_close(outputs(model), meant)
    model.save_pretrained(tmp_path / "t5")
    torch.testing.assert_close(outputs(T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").eval()), meant)


def test_names_that_are_parted_from_one_source_are_each_in_the_file(tmp_path: Path) -> None:
    """T5 has three names beside its table; where the table alone is changed, a file must hold all four."""
    config = T5Config(vocab_size=264, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    model.shared.weight = nn.Parameter(model.shared.weight.detach() + 1)
    settle_ties(model)
    with torch.no_grad():
        meant = model(input_ids=IDS, decoder_input_ids=IDS).logits
        model.save_pretrained(tmp_path)
        again = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(input_ids=IDS, decoder_input_ids=IDS).logits, meant)
    assert torch.equal(again.shared.weight, model.shared.weight)
