"""Exports say what the model says, in the programs that they are for, and what can't be exported is refused in one sentence."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
)
from transformers.utils import logging

import tiny
import twofold
import twofold.cli
from conftest import ARCHITECTURES, CONFIGS, TEXT, VOCABULARY, make_model, make_tokenizer
from twofold import TwofoldError
from twofold.checkpoint.plugin import attach
from twofold.exports import portable_layers
from twofold.exports.decoding import ModelDecoder, greedy
from twofold.exports.export import export
from twofold.exports.formats import FORMATS, Source, Written, export_format
from twofold.exports.formats.dense import save_dense
from twofold.exports.formats.lora import split
from twofold.exports.graph import open_export, trace
from twofold.exports.layers import check_plain
from twofold.model.load import LoadedModel, load_model, load_skeleton
from twofold.model.survey import survey
from twofold.nn.int_matrix import IntMatrix
from twofold.nn.layers._basis import SharedBasis
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.shared import SharedLinear
from twofold.nn.layers.sliced import SlicedLinear
from twofold.task.causal_lm import CausalLM

IDS = torch.tensor([[84, 104, 101, 32, 99, 97, 115, 116, 108, 101]])


def factorized(architecture="qwen2", **settings):
    settings = {"keep": 0.6, "texts": [TEXT], "tokens": 64, "window": 32, "quiet": True} | settings
    return twofold.factorize(make_model(architecture), make_tokenizer(), **settings)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny model whose greedy text is no repetition, and a factored checkpoint of it."""
    place = tmp_path_factory.mktemp("pair")
    make_model("qwen2").save_pretrained(place / "original")
    factorized().save_pretrained(place / "small")
    make_tokenizer().save_pretrained(place / "small")
    return place


@pytest.fixture
def small(pair, tmp_path):
    """The factored checkpoint, and its original beside it, for this test alone."""
    for name in ("original", "small"):
        shutil.copytree(pair / name, tmp_path / name)
    folder = tmp_path / "small"
    record = {"recipe": {"model": str(tmp_path / "original")}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["twofold", *map(str, arguments)])
        code = 0
        try:
            twofold.cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.long
def test_dense_is_an_ordinary_checkpoint(small, tmp_path, run):
    code, out, err = run("export", small, "--to", "dense", "--out", tmp_path / "out", "--json", "--quiet")
    assert code == 0, err
    said = json.loads(out)
    assert said["comparison"]["relative"] < 1e-5 and said["comparison"]["equal"] == said["comparison"]["tokens"] == 64
    assert said == json.loads((tmp_path / "out" / "twofold-export.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and "quantization_config" not in config
    original = load_file(tmp_path / "original" / "model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in original.items()}
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
        logits(AutoModelForCausalLM.from_pretrained(small)),
    )
    assert said["file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.long
def test_the_words_say_sizes_and_differences(small, tmp_path, run):
    code, out, err = run("export", small, "--to", "dense", "--out", tmp_path / "out", "-q", "--check-tokens", 5)
    assert code == 0, err
    assert "all 5 tokens are equal" in out and "MB in float32" in out and "relative difference" in out
    code, out, err = run("export", small, "--to", "dense", "--out", tmp_path / "out", "-q")
    assert code == 2 and "exists" in err
    code, out, err = run("export", small, "--to", "dense", "--out", tmp_path / "out", "-q", "--overwrite")
    assert code == 0, err


@pytest.mark.long
def test_narrow_weights_are_rounded_once(tmp_path):
    model = factorized()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    done = export(str(tmp_path / "small"), "dense", tmp_path / "out", quiet=True)
    assert done.dtype == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    wide = export(str(tmp_path / "small"), "dense", tmp_path / "wide", dtype="float32", quiet=True)
    assert wide.comparison.relative < 1e-5 < done.comparison.relative


def test_the_layers_of_the_shipped_file_are_ours():
    torch.manual_seed(0)
    left, right = torch.randn(12, 4, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    basis, coefficients = SharedBasis.from_factors("b", left, right)
    plain, plain_coefficients = SharedBasis.from_factors("b", left, right, "plain")
    rest = FactoredLinear.from_factors(left, right[:, :7])
    layers = [
        *(FactoredLinear.from_factors(left, right, torch.randn(12), form) for form in ("plain", "rows", "columns")),
        DenseColumnsLinear.around(rest, left[:, :3], torch.randperm(10), torch.randn(12)),
        SlicedLinear.from_part(torch.randn(5, 10), torch.tensor([0, 2, 3, 7, 11]), 12, "kept-rows", torch.randn(12)),
        SlicedLinear.from_part(torch.randn(12, 4), torch.tensor([1, 2, 6, 9]), 10, "kept-columns"),
        SharedLinear.on(basis, coefficients, torch.randn(12)),
        SharedLinear.on(plain, plain_coefficients),
    ]
    assert {basis.form, plain.form} == {"shared-columns", "shared-plain"}
    for layer in layers:
        dtype = layer.weight.dtype
        model = torch.nn.Module()
        model.base_model_prefix, model.place = "model", torch.nn.Linear(10, 12, layer.bias is not None, dtype=dtype)
        settings = {name: value for name, value in layer.settings().items() if name != "kind"}
        portable_layers.shrink(model, {"place": settings})
        stored = {f"place.{key}": value for key, value in layer.state_dict().items()}
        if isinstance(layer, SharedLinear):
            stored |= {f"twofold_bases.b.{key}": value for key, value in layer.basis.state_dict().items()}
        model.load_state_dict(stored)
        x = torch.randn(2, 3, 10, dtype=dtype)
        torch.testing.assert_close(model.place(x), layer(x))


def test_a_configuration_that_does_not_fit_fails_loudly():
    model = torch.nn.Module()
    model.base_model_prefix = "model"
    with pytest.raises(ValueError, match=r"model\.nowhere"):
        portable_layers.shrink(model, {"model.nowhere": {"rank": 2, "form": "plain"}})


@pytest.mark.long
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *((architecture, {}) for architecture in ARCHITECTURES),
        ("llama", {"objective": "modegpt"}),
        ("llama", {"objective": "dense-columns"}),
        ("llama", {"objective": "basis-sharing"}),
    ],
)
def test_portable_of_every_architecture_and_kind_of_layer(architecture, settings, tmp_path, modules_cache):
    model = factorized(architecture, **settings)
    expected, base = logits(model), model.base_model(input_ids=IDS).last_hidden_state
    source = Source(LoadedModel(model, None, "m", None, torch.float32), torch.float32)
    folder = tmp_path / "portable"
    folder.mkdir()
    FORMATS.get("portable").write(source, folder)
    config = json.loads((folder / "config.json").read_text())
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= config["auto_map"].keys()
    assert config["model_type"] == f"twofold_{model.config.model_type}" and "quantization_config" not in config
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    torch.testing.assert_close(logits(loaded), expected)
    torch.testing.assert_close(
        AutoModel.from_pretrained(folder, trust_remote_code=True)(input_ids=IDS).last_hidden_state, base
    )
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(logits(again), expected)


@pytest.mark.long
def test_portable_loads_where_twofold_can_not_be_imported(small, tmp_path, run):
    code, out, err = run("export", small, "--to", "portable", "--out", tmp_path / "out", "--json", "-q")
    assert code == 0, err
    said = json.loads(out)
    assert said["comparison"]["equal"] == 64 and said["comparison"]["relative"] < 1e-6
    stored, exported = load_file(small / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == exported.keys() and all(torch.equal(stored[key], exported[key]) for key in stored)
    assert "import twofold" not in (tmp_path / "out" / "modeling_twofold.py").read_text()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


@pytest.mark.long
def test_portable_of_an_encoder_with_a_masked_head(tmp_path, modules_cache):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=265, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    settings = {"keep": 0.7, "texts": [TEXT], "tokens": 64, "window": 32, "quiet": True}
    model = twofold.factorize(BertForMaskedLM(config).eval(), tiny.tokenizer(), **settings)
    expected = logits(model)
    model.save_pretrained(tmp_path / "small")
    tiny.tokenizer().save_pretrained(tmp_path / "small")
    done = export(str(tmp_path / "small"), "dense", tmp_path / "dense", quiet=True)
    assert done.comparison.tokens == 0 and done.comparison.relative < 1e-5, "nothing is decoded by an encoder"
    (tmp_path / "out").mkdir()
    FORMATS.get("portable").write(
        Source(LoadedModel(model, None, "m", None, torch.float32), torch.float32), tmp_path / "out"
    )
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits(loaded), expected)
    with pytest.raises(TwofoldError, match="does not write text token by token, and `to=onnx` takes models that do"):
        export(str(tmp_path / "small"), "onnx", tmp_path / "onnx", quiet=True)


@pytest.mark.long
def test_the_original_with_the_adapter_is_the_factored_model(small, tmp_path, run):
    from peft import PeftModel

    code, out, err = run("export", small, "--to", "lora", "--out", tmp_path / "out", "--json", "-q")
    assert code == 0, err
    assert json.loads(out)["comparison"]["relative"] < 1e-5
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    adapted = PeftModel.from_pretrained(original, tmp_path / "out")
    torch.testing.assert_close(
        logits(adapted), logits(AutoModelForCausalLM.from_pretrained(small)), atol=1e-4, rtol=1e-4
    )
    ranks = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"]
    modules = json.loads((small / "config.json").read_text())["quantization_config"]["modules"]
    layer = "model.layers.0.mlp.down_proj"  # (32, 64): the truncation of a projection has what was cut as its rank
    assert ranks[layer] == 32 - modules[layer]["rank"]


@pytest.mark.long
def test_an_adapter_of_less_rank_says_that_it_is_an_approximation(small, tmp_path):
    done = export(str(small), "lora", tmp_path / "out", rank=2, quiet=True)
    whole = export(str(small), "lora", tmp_path / "whole", quiet=True)
    assert any("approximation" in note for note in done.notes) and not any("approximation" in n for n in whole.notes)
    assert done.comparison.relative > 1e-3 > whole.comparison.relative
    assert done.file_bytes < whole.file_bytes


def test_a_residual_is_split_best_and_without_rounding():
    torch.manual_seed(0)
    difference = torch.randn(9, 4, dtype=torch.float64) @ torch.randn(4, 7, dtype=torch.float64)
    dense = torch.randn(9, 7, dtype=torch.float64)
    whole = split(dense + difference, dense, None, 1e-7)
    assert whole is not None and whole.full == whole.down.shape[0] == 4 and whole.left < 1e-20
    torch.testing.assert_close(whole.up @ whole.down, difference)
    part = split(dense + difference, dense, 2, 1e-7)
    values = torch.linalg.svdvals(difference)
    assert part is not None and part.full == 4 and part.down.shape[0] == 2
    assert (difference - part.up @ part.down).norm() ** 2 == pytest.approx(float(values[2:].square().sum()))
    assert part.left == pytest.approx(float(values[2:].square().sum() / values.square().sum()))
    assert split(dense, dense, None, 1e-7) is None


@pytest.mark.long
def test_another_original_is_refused(small, tmp_path):
    make_model("qwen2", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(TwofoldError, match="is not that of"):
        export(str(small), "lora", tmp_path / "out", base=str(tmp_path / "other"), quiet=True)
    (small / "run.json").unlink()
    with pytest.raises(TwofoldError, match="name the original with `base`"):
        export(str(small), "lora", tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def write_original_gguf(model, path):
    """A GGUF file as llama.cpp's converter writes it, of a tiny Llama with a part of its weights quantized."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"token {number}" for number in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight":
            continue  # it is that of the embeddings
        data = weight.numpy()
        if "q_proj" in key or "k_proj" in key:
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if "embed" in key or "gate" in key else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(data, kind)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
def test_gguf_of_the_merged_model(dtype, tmp_path, run):
    import gguf

    write_original_gguf(make_model("llama"), tmp_path / "original.gguf")
    original = load_model(str(tmp_path / "original.gguf"), device="cpu").model
    settings = {"keep": 0.6, "texts": [TEXT], "tokens": 64, "window": 32, "quiet": True}
    twofold.factorize(original, make_tokenizer(), **settings).save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    arguments = ["--to", "gguf", "--base", tmp_path / "original.gguf", "--dtype", dtype, "--out", tmp_path / "out"]
    code, out, err = run("export", tmp_path / "small", *arguments, "--json", "-q")
    assert code == 0, err
    comparison = json.loads(out)["comparison"]
    assert comparison["relative"] < (1e-5 if dtype == "auto" else 2e-2)
    before, after = (gguf.GGUFReader(path) for path in (tmp_path / "original.gguf", tmp_path / "out" / "model.gguf"))
    assert [t.name for t in before.tensors] == [t.name for t in after.tensors]
    assert {f.name: f.contents() for f in before.fields.values() if f.name[:4] != "GGUF"} == {
        f.name: f.contents() for f in after.fields.values() if f.name[:4] != "GGUF"
    }
    kinds = {t.name: t.tensor_type.name for t in after.tensors}
    assert kinds["token_embd.weight"] == "Q8_0", "what was not factorized is copied"
    assert kinds["blk.0.attn_q.weight"] == {"auto": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    if dtype == "auto":
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
        torch.testing.assert_close(logits(merged), logits(load_model(str(tmp_path / "small"), device="cpu").model))


def test_a_gguf_file_of_another_model_is_refused(small, tmp_path):
    write_original_gguf(make_model("llama"), tmp_path / "original.gguf")
    with pytest.raises(TwofoldError, match="name a GGUF file of its original with `base`"):
        export(str(small), "gguf", tmp_path / "out", base=str(tmp_path / "original.gguf"), quiet=True)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_graphs_decode_what_the_model_does(kind, tmp_path, run):
    small = tmp_path / "small"
    config = CONFIGS["qwen2"]()
    config = type(config)(
        **config.to_dict() | {"num_hidden_layers": 1, "layer_types": None}
    )  # a layer takes seconds to trace
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    settings = {"keep": 0.6, "texts": [TEXT], "tokens": 64, "window": 32, "quiet": True}
    twofold.factorize(model, make_tokenizer(), **settings).save_pretrained(small)
    make_tokenizer().save_pretrained(small)
    code, out, err = run("export", small, "--to", kind, "--out", tmp_path / "out", "--json", "-q")
    assert code == 0, err
    said = json.loads(out)  # nothing but JSON on standard output
    assert said["comparison"]["equal"] == said["comparison"]["tokens"] == 64 and said["comparison"]["relative"] < 1e-5
    model = load_model(str(small), device="cpu").model
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert f"has {layers} products with a weight" in said["notes"][0]
    assert layers > 2 * sum(isinstance(module, FactoredLinear) for module in model.modules())
    tokens = greedy(ModelDecoder(model), IDS, 64)[0][0].tolist()
    assert len(set(tokens)) > 5, "greedy text that is no repetition"
    weights = tmp_path / "out" / {"onnx": "model.onnx.data", "openvino": "openvino_model.bin"}[kind]
    assert weights.stat().st_size < 1.02 * said["weight_bytes"], "one copy of the weights, factors as factors"
    graph = (tmp_path / "out" / {"onnx": "model.onnx", "openvino": "openvino_model.xml"}[kind]).read_bytes()
    assert b"site-packages" not in graph and str(tmp_path).encode() not in graph, "no folder of this machine"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    decoder = open_export(tmp_path / "out")
    prompts = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(1))  # several rows, another length
    assert torch.equal(greedy(decoder, prompts, 20)[0], greedy(ModelDecoder(model), prompts, 20)[0])
    make_model("llama").save_pretrained(tmp_path / "dense")
    # The exporter has made caches trees of tensors, for the whole process; a chain of blocks stays one.
    dense = load_skeleton(str(tmp_path / "dense"))
    assert survey(dense, [], CausalLM().example(dense.model)).chain is not None


@pytest.mark.long
def test_what_a_format_can_not_express_is_refused():
    from transformers.exporters import OnnxConfig, OnnxExporter

    if not hasattr(torch.ops.twofold_test, "strange"):

        @torch.library.custom_op("twofold_test::strange", mutates_args=())
        def strange(x: torch.Tensor) -> torch.Tensor:
            return x.sin()

        strange.register_fake(torch.empty_like)

    class Strange(torch.nn.Module):
        def forward(self, x):
            return torch.ops.twofold_test.strange(x)

    model = make_model("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.model.norm = Strange()
    with pytest.raises(TwofoldError, match=r"can't be exported to onnx: .*twofold_test.*; use `to=dense`"):
        trace("onnx", OnnxExporter(), OnnxConfig(dynamic=True), model, "m")


@pytest.mark.parametrize(
    ("kind", "to", "message"),
    [
        ("bart", "onnx", r"does not write text token by token, and `to=onnx` takes models that do"),
        ("speech_to_text", "dense", r"can't be compared.*Speech2TextForConditionalGeneration reads input_features"),
    ],
)
def test_an_encoder_decoder_is_refused_where_it_can_not_be_read(kind, to, message, tmp_path):
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "pad_token_id": 258, "decoder_start_token_id": 257}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
    config, make = {
        "bart": (BartConfig, BartForConditionalGeneration),
        "speech_to_text": (Speech2TextConfig, Speech2TextForConditionalGeneration),
    }[kind]
    make(config(**sizes, **heads, encoder_ffn_dim=48, decoder_ffn_dim=48)).save_pretrained(tmp_path / "model")
    with pytest.raises(TwofoldError, match=message):
        export(str(tmp_path / "model"), to, tmp_path / "out", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_does_not_say_the_same_is_not_kept(small, tmp_path):
    @export_format("wrong")
    def write_wrong(source, folder):
        save_dense(source, folder)
        source.model.lm_head.weight.mul_(1.1)
        return Written(lambda: ModelDecoder(source.model))

    try:
        with pytest.raises(TwofoldError, match=r"differ from the model's by 1\.0e-01"):
            export(str(small), "wrong", tmp_path / "out", quiet=True)
    finally:
        del FORMATS._methods["wrong"]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "tflite"], "there is no export format 'tflite'; choose one of dense, gguf, lite-whisper"),
        (["--to", "dense", "--rank", "4"], "--rank is of --to lora"),
        (["--to", "dense", "--dtype", "int8"], "--dtype must be auto, float32, bfloat16 or float16"),
        (["--to", "onnx", "--dtype", "float16"], "--to onnx writes float32"),
        (["--to", "gguf"], "name it with --base model.gguf"),
    ],
)
def test_bad_input_gives_one_sentence(arguments, message, small, tmp_path, run):
    code, out, err = run("export", small, *arguments, "--out", tmp_path / "out", "-q")
    assert code == 2 and out == "" and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["portable", "lora"])
def test_a_dense_model_has_no_factors(kind, small, tmp_path):
    with pytest.raises(TwofoldError, match="has no factored layer"):
        export(str(tmp_path / "original"), kind, tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("kind", "module"), [("lora", "peft"), ("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("openvino", "openvino")]
)
def test_a_missing_package_is_named(kind, module, small, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else find(name, *a))
    with pytest.raises(TwofoldError, match=rf"needs {module}, which is not installed: pip install 'twofold\[export\]'"):
        export(str(small), kind, tmp_path / "out", quiet=True)


def test_quantized_factors_are_refused(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = factorized("llama")
    check_plain(model, "m")
    attach(model)
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name.endswith("expand"))
    with pytest.raises(TwofoldError, match=r"expand of m is quantized"):
        check_plain(model, "m")


def test_a_folder_without_a_graph(tmp_path):
    with pytest.raises(TwofoldError, match="holds no exported graph"):
        open_export(tmp_path)


logging.disable_progress_bar()


@pytest.mark.parametrize("named", [True, False])
def test_the_original_is_not_replaced_by_its_adapter(named, small, tmp_path):
    original = tmp_path / "original"
    (original / "twofold-export.json").write_text("{}", encoding="utf-8")  # ours, so --overwrite may replace it
    base = str(original) if named else None
    with pytest.raises(TwofoldError, match="which this run reads"):
        export(str(small), "lora", original, base=base, overwrite=True, quiet=True)
    assert (original / "model.safetensors").is_file()


@pytest.mark.long
@pytest.mark.parametrize("kind", FORMATS.names())
def test_integers_are_exported_merged_or_refused(kind, tmp_path, monkeypatch):
    write_original_gguf(make_model("llama"), tmp_path / "original.gguf")
    original = load_model(str(tmp_path / "original.gguf"), device="cpu").model
    settings = {"keep": 0.6, "texts": [TEXT], "tokens": 64, "window": 32, "quiet": True, "bits": 8}
    model = twofold.factorize(original, make_tokenizer(), **settings)
    assert any(isinstance(module, IntMatrix) for module in model.modules())
    model.save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    base = {"base": str(tmp_path / "original.gguf")} if kind == "gguf" else {}
    if not FORMATS.get(kind).integers:
        with pytest.raises(TwofoldError, match=r"is kept in integers \(`bits`\)"):
            export(str(tmp_path / "small"), kind, tmp_path / "out", quiet=True)
        return
    done = export(str(tmp_path / "small"), kind, tmp_path / "out", dtype="float32", quiet=True, **base)
    assert done.comparison.relative < 1e-5
