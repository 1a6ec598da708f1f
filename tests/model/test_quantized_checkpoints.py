"""Checkpoints that are quantized already: each is told as one, and dequantized to what its numbers stand for."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig, TorchAoConfig

import twofold
from bases import logits
from conftest import TEXT, VOCABULARY, make_model, make_tokenizer
from twofold.model.load import load_model, load_skeleton

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]  # by the end of the name; and the weight that they stand for
pytestmark = pytest.mark.long
BLOCK = 24  # of 32 or 80 rows and columns: the last blocks are cut


def blocks(weight: torch.Tensor) -> Packed:
    """DeepSeek's fp8: a scale for each block."""
    packed, dense = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    scales = torch.empty(-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = weight[part].abs().max() / 448
            packed[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            dense[part] = packed[part].float() * scales[i, j]
    return {"weight": packed, "weight_scale_inv": scales}, dense


def exponents(weight: torch.Tensor) -> Packed:
    """Return blocks whose scales are bytes: exponents of two."""
    parts, _ = blocks(weight)
    bytes_ = (parts["weight_scale_inv"].log2().round() + 127).to(torch.uint8)
    spread = torch.exp2(bytes_.float() - 127).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    dense = parts["weight"].float() * spread[: weight.shape[0], : weight.shape[1]]
    return {**parts, "weight_scale_inv": bytes_}, dense


def rows(weight: torch.Tensor) -> Packed:
    scales = weight.abs().amax(1, keepdim=True) / 448
    packed = (weight / scales).to(torch.float8_e4m3fn)
    return {"weight": packed, "weight_scale": scales, "input_scale": torch.ones(1)}, packed.float() * scales


def one(weight: torch.Tensor) -> Packed:
    packed = (weight / 0.01).to(torch.float8_e4m3fn)
    return {"weight": packed, "weight_scale": torch.tensor(0.01)}, packed.float() * 0.01


def cached(weight: torch.Tensor) -> Packed:
    parts, dense = one(weight)
    return {**parts, "k_scale": torch.ones(1), "input_scale": torch.ones(1)}, dense


def cast(weight: torch.Tensor) -> Packed:
    packed = weight.to(torch.float8_e5m2)
    return {"weight": packed}, packed.float()


def int8(weight: torch.Tensor) -> Packed:
    """The 8 bits of bitsandbytes: the largest number of each row."""
    largest = weight.abs().amax(1)
    packed = (weight / largest[:, None] * 127).round().to(torch.int8)
    parts = {"weight": packed, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, packed * largest[:, None] / 127


def zero_points(weight: torch.Tensor) -> Packed:
    """Return integers of compressed-tensors that are not symmetric."""
    scales, zeros = weight.abs().amax(1, keepdim=True) / 100, torch.arange(len(weight))[:, None].to(torch.int8) % 7
    packed = ((weight / scales).round() + zeros).to(torch.int8)
    parts = {"weight": packed, "weight_scale": scales, "weight_zero_point": zeros}
    return parts, (packed.float() - zeros) * scales


def words(numbers: list[list[int]], bits: int) -> torch.Tensor:
    """Put rows of small numbers into rows of 32-bit words, the first number lowest."""
    each, packed = 32 // bits, []
    for row in numbers:
        sums = [
            sum(number << (bits * place) for place, number in enumerate(row[i : i + each]))
            for i in range(0, len(row), each)
        ]
        packed.append([value - (1 << 32) if value >= 1 << 31 else value for value in sums])
    return torch.tensor(packed, dtype=torch.int32)


def drawn(weight: torch.Tensor, bits: int, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw codes (inputs, outputs), zero points and scales (groups, outputs)."""
    draw = torch.Generator().manual_seed(weight.numel() + bits)
    codes = torch.randint(0, 1 << bits, (weight.shape[1], weight.shape[0]), generator=draw)
    zeros = torch.randint(1, 1 << bits, (groups, weight.shape[0]), generator=draw)
    return codes, zeros, (torch.rand(groups, weight.shape[0], generator=draw) / (1 << bits)).half()


def gptq(bits: int = 4, less: int = 1, ordered: bool = True) -> Callable[[torch.Tensor], Packed]:
    def pack(weight: torch.Tensor) -> Packed:
        codes, zeros, scales = drawn(weight, bits)
        group = torch.arange(len(codes)) // (len(codes) // 2)
        if not ordered:
            group = group[torch.randperm(len(group), generator=torch.Generator().manual_seed(0))]
        parts = {
            "qweight": words(codes.T.tolist(), bits).T.contiguous(),
            "qzeros": words((zeros - less).tolist(), bits),
            "scales": scales,
            "g_idx": group.int(),
        }
        return parts, ((codes - zeros[group]) * scales[group].float()).T.contiguous()

    return pack


def awq(weight: torch.Tensor) -> Packed:
    codes, zeros, scales = drawn(weight, 4)
    order = [8 * start + column for start in range(weight.shape[0] // 8) for column in (0, 2, 4, 6, 1, 3, 5, 7)]
    group = torch.arange(len(codes)) // (len(codes) // 2)
    parts = {
        "qweight": words(codes[:, order].tolist(), 4),
        "qzeros": words(zeros[:, order].tolist(), 4),
        "scales": scales,
    }
    return parts, ((codes - zeros[group]) * scales[group].float()).T.contiguous()


FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
FORMS: dict[str, tuple[Callable[[torch.Tensor], Packed], dict[str, Any] | None]] = {
    "fp8": (blocks, FP8),
    "fp8, exponents": (exponents, FP8),
    "fp8 of compressed-tensors": (rows, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "fp8 of fbgemm": (rows, {"quant_method": "fbgemm_fp8"}),
    "fp8 of modelopt": (one, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8 beside scales of a cache": (cached, FP8),
    "fp8 without settings": (one, None),
    "fp8 without scales": (cast, None),
    "int8 of bitsandbytes": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "int8 of compressed-tensors": (zero_points, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "gptq": (gptq(), {"quant_method": "gptq", "bits": 4}),
    "gptq of 8 bits, out of order": (gptq(8, ordered=False), {"quant_method": "gptq", "bits": 8}),
    "gptq of 2 bits, second version": (gptq(2, 0), {"quant_method": "gptq", "bits": 2, "checkpoint_format": "gptq_v2"}),
    "gptq without settings": (gptq(), None),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
}


def written(folder: Path, form: str) -> Any:
    """Write a tiny Llama whose linear layers are packed; return the model that its numbers stand for."""
    pack, settings = FORMS[form]
    model = make_model("llama")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if "proj" in name]:
        parts, dense[name] = pack(tensors.pop(name))
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(folder, dtype="float32", **({} if settings is None else {"quantization_config": settings}))
    assert not model.load_state_dict(dense, strict=False).unexpected_keys
    return model


def configure(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def is_ordinary(model: Any, folder: Path, tmp_path: Path) -> None:
    """The model is dense, and so is what it is written as."""
    assert all(type(p.data) is torch.Tensor and p.is_floating_point() for p in model.parameters())
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    assert (tmp_path / "again" / "generation_config.json").is_file()


@pytest.mark.parametrize("form", FORMS)
def test_dequantized_weights_are_what_the_numbers_stand_for(form, tmp_path):
    meant = written(tmp_path / "packed", form)
    loaded = load_model(str(tmp_path / "packed"), dequantize=True)
    torch.testing.assert_close(logits(loaded.model), logits(meant), rtol=1e-5, atol=1e-5)
    assert loaded.stored_dtype == torch.float32 and "turned into ordinary ones" in loaded.notes[0]
    is_ordinary(loaded.model, tmp_path / "packed", tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_without_the_setting_they_are_told_as_what_they_are(form, tmp_path):
    written(tmp_path / "packed", form)
    method = (FORMS[form][1] or {}).get("quant_method", "no quantization_config")
    for load in (load_model, load_skeleton):
        with pytest.raises(twofold.TwofoldError, match=rf"is quantized.* {method}.*give `dequantize`"):
            load(str(tmp_path / "packed"))
    assert load_skeleton(str(tmp_path / "packed"), dequantize=True).dequantized


@pytest.mark.parametrize(
    "settings",
    [
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        BitsAndBytesConfig(load_in_8bit=True),
        "Int8WeightOnlyConfig",
        "Float8WeightOnlyConfig",
    ],
    ids=["bitsandbytes, 4 bits", "bitsandbytes, 8 bits", "torchao, 8 bits", "torchao, floats of 8 bits"],
)
def test_what_other_libraries_packed_is_unpacked(settings, tmp_path):
    if isinstance(settings, str):
        settings = TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), settings)())
    make_model("llama").save_pretrained(tmp_path / "base")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(twofold.TwofoldError, match=r"is quantized with (bitsandbytes|torchao)"):
        load_model(str(tmp_path / "packed"))
    loaded = load_model(str(tmp_path / "packed"), dequantize=True)
    own, theirs = (model.get_submodule("model.layers.0.mlp.up_proj").weight for model in (loaded.model, packed))
    if not hasattr(theirs, "dequantize") or not theirs.is_floating_point() or hasattr(theirs, "quant_state"):
        theirs = packed.dequantize(torch.float32).get_submodule("model.layers.0.mlp.up_proj").weight
    else:
        theirs = theirs.dequantize()
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)
    is_ordinary(loaded.model, tmp_path / "packed", tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_that_hold_their_weights_turned_get_them_so(bits, tmp_path):
    """GPT-2's: the libraries pack them as (outputs, inputs), whatever their shape; some here are square."""
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    make_model("gpt2").save_pretrained(tmp_path / "base")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    packed.save_pretrained(tmp_path / "packed")
    meant = packed.dequantize(torch.float32)
    loaded = load_model(str(tmp_path / "packed"), dequantize=True)
    torch.testing.assert_close(logits(loaded.model), logits(meant), rtol=1e-4, atol=1e-4)
    is_ordinary(loaded.model, tmp_path / "packed", tmp_path)


@pytest.mark.parametrize("prefixed", [True, False])
def test_integers_of_turned_layers_are_turned(prefixed, tmp_path):
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "packed")
    tensors, dense = load_file(tmp_path / "packed" / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))]:
        parts, weight = gptq()(tensors.pop(name).T.contiguous())
        dense[name] = weight.T
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    tensors = tensors if prefixed else {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    configure(tmp_path / "packed", quantization_config={"quant_method": "gptq", "bits": 4})
    assert dense and not model.load_state_dict(dense, strict=False).unexpected_keys
    loaded = load_model(str(tmp_path / "packed"), dequantize=True)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["fp8", "fp8 without scales", "int8 of bitsandbytes", "gptq"])
@pytest.mark.parametrize("name", ["qscale_weight", "weight_scaling_factor", "scale_inv", "weight_scale_2"])
def test_numbers_beside_something_unknown_are_refused(form, name, tmp_path):
    """With scales that are known or without any: what else there is could change them."""
    written(tmp_path / "packed", form)
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    tensors[f"model.layers.1.mlp.up_proj.{name}"] = torch.ones(1)
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    for load in (load_model, load_skeleton):
        with pytest.raises(
            twofold.TwofoldError, match=rf"is packed, and model\.layers\.1\.mlp\.up_proj\.{name} may be"
        ):
            load(str(tmp_path / "packed"), dequantize=True)


def test_floats_of_8_bits_without_scales_are_weights_only_if_nothing_says_otherwise(tmp_path):
    written(tmp_path / "packed", "fp8 without scales")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old files, computed anew
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    for load in (load_model, load_skeleton):
        assert any("8 bits without scales" in note for note in load(str(tmp_path / "packed"), dequantize=True).notes)
    configure(tmp_path / "packed", quantization_config=FP8)
    with pytest.raises(twofold.TwofoldError, match=r"of 8 bits and has no scale, and config.json says"):
        load_model(str(tmp_path / "packed"), dequantize=True)


@pytest.mark.parametrize("text", ["{", '{"cache_implementation": "nope", "num_beams": "x"}'])
def test_no_settings_of_generation_stop_it(text, tmp_path):
    written(tmp_path / "packed", "fp8")
    (tmp_path / "packed" / "generation_config.json").write_text(text)
    assert load_model(str(tmp_path / "packed"), dequantize=True).dequantized


def test_a_layout_that_nobody_knows_is_told(tmp_path):
    written(tmp_path / "packed", "fp8 of modelopt")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = tensors[name].view(torch.uint8)
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        twofold.TwofoldError, match=r"quantized with modelopt, in a layout that is not known here; name"
    ):
        load_model(str(tmp_path / "packed"), dequantize=True)


def test_experts_of_four_bits_are_unpacked(tmp_path):
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64, rope_scaling=None,
        eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "packed")
    tensors, dense = load_file(tmp_path / "packed" / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32))
        powers = torch.randint(120, 126, codes.shape[:-1])
        tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = powers.to(torch.uint8)
        weight = values[codes] * torch.exp2(powers.float() - 127)[..., None]
        dense[name] = weight.reshape(experts, outputs, inputs).transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    configure(tmp_path / "packed", quantization_config={"quant_method": "mxfp4"})
    model.load_state_dict(dense, strict=False)
    loaded = load_model(str(tmp_path / "packed"), dequantize=True)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-5, atol=1e-5)
    is_ordinary(loaded.model, tmp_path / "packed", tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"quant_method": "hqq"},
            r"quantized with hqq, and transformers can't dequantize it here .* name the model that",
        ),
        ({"quant_method": "quanto", "weights": "int8"}, "quantized with quanto, and transformers can't"),
        ({"quant_method": "bitnet"}, "quantized with bitnet, and transformers can't"),
        ({"quant_method": "compressed-tensors"}, "install compressed-tensors, or name"),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "",
)
def test_what_can_not_be_dequantized_here_says_what_it_lacks(settings, says, tmp_path):
    written(tmp_path / "packed", "fp8")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = tensors[name].view(torch.uint8)  # of whatever layout
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    configure(tmp_path / "packed", quantization_config=settings)
    with pytest.raises(twofold.TwofoldError, match=says):
        load_model(str(tmp_path / "packed"), dequantize=True)


@pytest.mark.parametrize(
    "settings",
    [5, "fp8", ["fp8"], {}, {"bits": 4}, {"quant_method": "nope"}, {"quant_method": 5},
     {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}],
)  # fmt: skip
def test_settings_that_say_nothing_are_told(settings, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    configure(tmp_path / "base", quantization_config=settings)
    for load in (load_model, load_skeleton):
        with pytest.raises(twofold.TwofoldError, match=r"quantization_config"):
            load(str(tmp_path / "base"), dequantize=True)
    configure(tmp_path / "base", quantization_config=None)
    load_model(str(tmp_path / "base"))


def test_scales_that_do_not_belong_are_refused(tmp_path):
    written(tmp_path / "packed", "fp8")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = torch.ones(3, 7)
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(twofold.TwofoldError, match=r"layers\.1\.mlp\.up_proj\.weight .*scales .*the shape \(3, 7\)"):
        load_model(str(tmp_path / "packed"), dequantize=True)


def test_every_command_tells_it_and_takes_the_setting(tmp_path):
    """Each refuses a quantized model by the same sentence, and with `dequantize` does what it does to the dense one."""
    meant = written(tmp_path / "packed", "fp8")
    shutil.copytree(tmp_path / "packed", tmp_path / "meant")
    meant.save_pretrained(tmp_path / "meant")
    text, rows_ = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text(TEXT)
    rows_.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    run = {"keep": 0.6, "calibration": [str(text)], "tokens": 256, "window": 32, "eval_windows": 1, "quiet": True}
    commands: dict[str, Callable[..., Any]] = {
        "inspect": twofold.inspect,
        "plan": lambda model, **more: twofold.plan(model, keep=0.6, quiet=True, estimate=False, **more),
        "compress": lambda model, **more: twofold.compress(model, tmp_path / "small", **run, **more),
        "evaluate": lambda model, **more: twofold.evaluate(model, str(text), window=32, windows=2, quiet=True, **more),
        "export": lambda model, **more: twofold.export(model, "dense", tmp_path / "dense", quiet=True, **more),
        "tune": lambda model, **more: twofold.tune(model, tmp_path / "t", data=[str(rows_)], dry_run=True, **more),
        "merge": lambda model, **more: twofold.merge(model, str(tmp_path / "adapter"), tmp_path / "merged", **more),
    }
    get_peft_model(copy.deepcopy(meant), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    for command in commands.values():
        with pytest.raises(twofold.TwofoldError, match=r"is quantized with fp8.*give `dequantize`"):
            command(str(tmp_path / "packed"))
    results = {name: command(str(tmp_path / "packed"), dequantize=True) for name, command in commands.items()}
    plain = twofold.evaluate(str(tmp_path / "meant"), str(text), window=32, windows=2, quiet=True)
    assert results["evaluate"].models[0].loss == pytest.approx(plain.models[0].loss, rel=1e-5)
    assert results["inspect"].target_numbers == twofold.inspect(str(tmp_path / "meant")).target_numbers
    assert any("turned into ordinary" in note for note in results["plan"].notes)
    assert any("turned into ordinary" in note for note in results["compress"].notes)
    assert any("turned into ordinary" in note for note in results["export"].notes)
    for folder in ("dense", "merged"):  # a new adapter changes nothing
        torch.testing.assert_close(
            logits(load_model(str(tmp_path / folder)).model), logits(meant), rtol=1e-4, atol=1e-4
        )
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "twofold"
    with pytest.raises(
        twofold.TwofoldError, match=r"quantized with fp8, and `dequantize` works on the whole model in memory"
    ):
        twofold.compress(str(tmp_path / "packed"), tmp_path / "other", **run, dequantize=True, stream="always")
