"""The plug-in for vLLM: shards are what the separate layers are, and a checkpoint's tensors find their places by vLLM's names."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import vllm_double
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import make_model
from twofold import FactoredLinear, TwofoldError
from twofold.checkpoint.plugin import attach
from twofold.nn.places import replace_module
from twofold.vllm_plugin.shards import check_modules, factored_names, original_names, shard_index, shards_of
from twofold.vllm_plugin.stores import Stores

IDS = torch.arange(20)[None]
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
# Each form at least once in a merged layer and in a plain one, and dense shards beside factored ones.
FORMS = {
    "0.self_attn": {"q_proj": "rows", "k_proj": "columns", "v_proj": "dense", "o_proj": "plain"},
    "0.mlp": {"gate_proj": "columns", "up_proj": "rows", "down_proj": "rows"},
    "1.self_attn": {"q_proj": "plain", "k_proj": "rows", "v_proj": "rows", "o_proj": "columns"},
    "1.mlp": {"gate_proj": "dense", "up_proj": "plain", "down_proj": "dense"},
}


@pytest.fixture
def vllm():
    from twofold.vllm_plugin.entry import register

    with vllm_double.installed():
        register()
        yield vllm_double
        vllm_double.PARALLEL["size"] = 1


def factored(inputs, outputs, form, rank):
    left, right = torch.randn(outputs, rank), torch.randn(rank, inputs) / inputs**0.5
    layer = FactoredLinear.from_factors(left, right, None, form)
    assert layer.form == form
    return layer


def factored_model(architecture="llama"):
    model = make_model(architecture)
    for block, forms in FORMS.items():
        for part, form in forms.items():
            dense = model.get_submodule(f"model.layers.{block}.{part}")
            if form == "dense":
                continue
            layer = factored(dense.in_features, dense.out_features, form, 5 if "0" in block else 7)
            if dense.bias is not None:
                layer.bias = nn.Parameter(torch.randn(dense.out_features))
            replace_module(model, f"model.layers.{block}.{part}", layer)
    attach(model)
    return model


def vllm_layers(config, quantized):
    """The linear layers of vLLM's Llama or Qwen2, by their names."""
    width, inner, bias = config.hidden_size, config.intermediate_size, config.model_type == "qwen2"
    head = width // config.num_attention_heads
    key = head * config.num_key_value_heads
    layers = {}
    for i in range(config.num_hidden_layers):
        for name, kind, n, sizes, biased in (
            ("self_attn.qkv_proj", vllm_double.MergedLinear, width, [width, key, key], bias),
            ("self_attn.o_proj", vllm_double.RowLinear, width, [width], False),
            ("mlp.gate_up_proj", vllm_double.MergedLinear, width, [inner, inner], False),
            ("mlp.down_proj", vllm_double.RowLinear, inner, [width], False),
        ):
            prefix = f"model.layers.{i}.{name}"
            layers[prefix] = kind(n, sizes, biased, quantized, prefix)
    return layers


class Part(nn.Module):
    """A part of a merged layer's output, in the place of a projection of transformers' model."""

    def __init__(self, layer, start, size):
        super().__init__()
        self.layer, self.start, self.size = layer, start, size

    def forward(self, x):
        return self.layer(x).narrow(-1, self.start, self.size)


def put_in_place(model, layers):
    for prefix, layer in layers.items():
        start = 0
        for name, size in zip(original_names(prefix, vllm_double.PACKED), layer.output_sizes, strict=True):
            replace_module(model, name, Part(layer, start, size))
            start += size


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_saved_checkpoint_gives_the_same_logits(architecture, tmp_path, vllm):
    model = factored_model(architecture)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    stored = reloaded.config.quantization_config.to_dict()
    quantized = vllm.CLASSES["twofold"].from_config(stored)
    quantized.packed_modules_mapping = vllm.PACKED
    quantized.apply_vllm_mapper(vllm.LLAMA)
    layers = vllm_layers(model.config, quantized)
    others = vllm.load(layers, load_file(tmp_path / "model.safetensors").items())
    ours = make_model(architecture, seed=1)
    put_in_place(ours, layers)
    left = ours.load_state_dict(others, strict=False)
    assert not left.unexpected_keys and all(".layer." in k or k == "lm_head.weight" for k in left.missing_keys)
    ours.tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, reloaded(IDS).logits, rtol=1e-4, atol=1e-4)


# The mathematics, without vLLM's classes


def merged(parts, names=("a.q_proj", "a.k_proj", "a.v_proj")):
    """A layer that holds these modules as its shards, loaded by vLLM's ids, and its stores."""
    modules = {name: part.settings() for name, part in zip(names, parts, strict=True) if hasattr(part, "settings")}
    shards = shards_of("a.qkv_proj", names, modules, parts[0].in_features, [part.out_features for part in parts])
    stores, layer = Stores(shards), nn.Module()
    stores.attach(layer, torch.float32)
    ids = "qkv" if len(parts) == 3 else range(len(parts)) if len(parts) > 1 else [None]
    for part, shard_id in zip(parts, ids, strict=True):
        for name, tensor in part.state_dict().items():
            if name != "bias":
                parameter = layer.get_parameter(name)
                parameter.weight_loader(parameter, tensor, shard_id)
    return layer, stores


@pytest.mark.parametrize(
    "forms",
    [
        ["rows"], ["columns"], ["plain"], ["rows", "rows"], ["columns", "plain"], ["plain", "columns", "rows"],
        ["columns", "columns", "columns"], ["dense", "rows", "dense"], ["rows", "dense", "columns"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_a_merged_layer_is_its_separate_layers(forms, bias):
    torch.manual_seed(0)
    sizes = [24, 12, 10]
    parts = [
        nn.Linear(20, m, bias=False) if form == "dense" else factored(20, m, form, 4 + i)
        for i, (form, m) in enumerate(zip(forms, sizes, strict=False))
    ]
    layer, stores = merged(parts, [f"a.{i}" for i in range(len(parts))])
    stores.check_loaded()
    x, offset = torch.randn(3, 7, 20), torch.randn(sum(sizes[: len(parts)])) if bias else None
    expected = torch.cat([part(x) for part in parts], -1)
    with torch.inference_mode():
        found = stores.product(x, layer, offset)
    torch.testing.assert_close(found, expected.detach() + (0 if offset is None else offset), rtol=1e-5, atol=1e-5)
    stored = sum(p.numel() for p in layer.parameters() if p.is_floating_point())
    guard = 0 if "dense" in forms else 1  # a parameter of no elements is kept as one of one
    assert stored == sum(p.weight.numel() if isinstance(p, nn.Linear) else p.numbers for p in parts) + guard


@pytest.mark.long
def test_one_graph_serves_any_number_of_tokens():
    """vLLM compiles the model whole, with the number of tokens left open."""
    torch.manual_seed(0)
    parts = [factored(20, 24, "rows", 4), factored(20, 12, "columns", 5), nn.Linear(20, 10, bias=False)]
    layer, stores = merged(parts)

    def product(x):
        return stores.product(x, layer)

    compiled = torch.compile(product, fullgraph=True, dynamic=True, backend="eager")
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (2, 9):
            x = torch.randn(tokens, 20)
            torch.testing.assert_close(compiled(x), product(x))


# Names


def test_names_of_merged_layers():
    q = "model.layers.0.self_attn.q_proj"
    assert original_names("m.0.qkv_proj", vllm_double.PACKED) == ["m.0.q_proj", "m.0.k_proj", "m.0.v_proj"]
    assert original_names("m.0.o_proj", vllm_double.PACKED) == ["m.0.o_proj"]
    assert factored_names("model.layers.0.self_attn.qkv_proj", vllm_double.PACKED, {q: {}})[0] == q
    assert factored_names("model.layers.1.self_attn.qkv_proj", vllm_double.PACKED, {q: {}}) == []
    # Phi-3 has a qkv_proj of its own: it is one matrix, whatever vLLM merges elsewhere.
    assert factored_names("m.qkv_proj", vllm_double.PACKED, {"m.qkv_proj": {}}) == ["m.qkv_proj"]
    whole = shards_of("m.qkv_proj", ["m.qkv_proj"], {"m.qkv_proj": {"rank": 3, "form": "rows"}}, 8, [8, 4, 4])
    assert [shard.outputs for shard in whole] == [16] and shard_index(None, whole) == 0


def test_modules_are_renamed_as_the_model_is(vllm):
    q = {"rank": 3, "form": "rows"}
    config = vllm.CLASSES["twofold"]({"model.layers.0.self_attn.q_proj": q})
    config.apply_vllm_mapper(vllm.WeightsMapper(vllm.LLAMA.stacked, {"model.": "language_model.model."}))
    assert config.modules == {"language_model.model.layers.0.self_attn.q_proj": q}


def test_layers_that_are_not_factored_are_vllms_own(vllm):
    config = vllm.CLASSES["twofold"]({"a.q_proj": {"rank": 3, "form": "rows"}})
    config.packed_modules_mapping = vllm.PACKED
    dense = vllm.RowLinear(8, [8], False, config, "a.o_proj")
    assert type(dense.quant_method) is vllm.UnquantizedLinearMethod
    assert config.get_quant_method(nn.Embedding(4, 4), "embed") is None
    assert (
        type(vllm.MergedLinear(8, [8, 4, 4], False, config, "a.qkv_proj").quant_method).__name__
        == "TwofoldLinearMethod"
    )


# What is refused


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"rank": 3, "form": "shared-plain", "basis": "b"}, "of the kind 'shared'"),
        ({"kind": "shared", "rank": 3, "form": "shared-plain", "basis": "b"}, "of the kind 'shared'"),
        ({"kept": 3, "form": "kept-rows"}, "of the kind 'sliced'"),
        ({"kind": "sliced", "kept": 3, "form": "kept-rows"}, "of the kind 'sliced'"),
        ({"rank": 3, "form": "columns", "columns": 2}, "of the kind 'dense-columns'"),
        ({"kind": "dense-columns", "rank": 3, "form": "columns", "columns": 2}, "of the kind 'dense-columns'"),
        ({"rank": 3, "form": "rows", "bits": 8, "group": None}, "its numbers are integers"),
        ({"form": "dense", "bits": 4, "group": 32}, "its numbers are integers"),
        ({"rank": 3, "form": "diagonal"}, "its form 'diagonal' is none of"),
        ({"rank": "3", "form": "rows"}, "a whole number as its rank"),
        ([3], "must be a mapping"),
    ],
)
def test_other_kinds_of_layers_are_refused_in_one_sentence(settings, reason):
    with pytest.raises(TwofoldError, match="twofold export DIR --to dense") as error:
        check_modules({"a.q_proj": {"rank": 2, "form": "rows"}, "b.o_proj": settings})
    assert reason in str(error.value) and "b.o_proj" in str(error.value) and "\n" not in str(error.value)


def test_experts_tensor_parallelism_and_heads_are_refused(vllm):
    cls, rows = vllm.CLASSES["twofold"], {"rank": 3, "form": "rows"}
    with pytest.raises(TwofoldError, match="experts of a block"):
        cls({"model.layers.0.mlp.experts.3.up_proj": rows})
    config = cls({"a.o_proj": rows, "lm_head": rows})
    vllm.PARALLEL["size"] = 2
    with pytest.raises(TwofoldError, match=r"tensor parallel size of a\.o_proj is 2; set --tensor-parallel-size 1"):
        vllm.RowLinear(8, [8], False, config, "a.o_proj")
    vllm.PARALLEL["size"] = 1
    with pytest.raises(TwofoldError, match="factorizes lm_head, where vLLM has Embedding and no linear layer"):
        config.get_quant_method(nn.Embedding(4, 4), "lm_head")
    with pytest.raises(TwofoldError, match="install a newer Twofold"):
        cls.from_config({"quant_method": "twofold", "format_version": 99, "modules": {}})
    with pytest.raises(TwofoldError, match="rank of a factored layer"):
        vllm.RowLinear(8, [8], False, cls({"a.o_proj": {"rank": 9, "form": "plain"}}), "a.o_proj")


def test_tensors_that_do_not_fit_or_do_not_come_are_refused():
    torch.manual_seed(0)
    parts = [factored(20, 24, "rows", 4), factored(20, 12, "plain", 5), nn.Linear(20, 10, bias=False)]
    layer, stores = merged(parts)
    reduce, weight, order = layer.reduce.weight, layer.weight, layer.order
    with pytest.raises(TwofoldError, match=r"size mismatch: a.k_proj.reduce.weight in the checkpoint is \(4, 20\)"):
        reduce.weight_loader(reduce, torch.zeros(4, 20), "k")
    with pytest.raises(TwofoldError, match=r"a.v_proj.weight in the checkpoint is \(1,\)"):
        weight.weight_loader(weight, torch.zeros(1), "v")  # a guard where a dense weight belongs
    with pytest.raises(TwofoldError, match="there is none"):
        weight.weight_loader(weight, torch.zeros(24, 20), "q")  # a dense weight where factors belong
    with pytest.raises(TwofoldError, match="no order of its 24 rows"):
        order.weight_loader(order, torch.zeros(24, dtype=torch.int32), "q")
    for shard_id in (None, 3, -1, (0, 1), "x", True):
        with pytest.raises(TwofoldError, match="can't place"):
            reduce.weight_loader(reduce, torch.zeros(4, 20), shard_id)
    stores.check_loaded()
    stores.expand.arrived.discard(1)
    with pytest.raises(TwofoldError, match=r"lacks 1 tensors of one layer, first a\.k_proj\.expand\.weight"):
        stores.check_loaded()
    with pytest.raises(TwofoldError, match=r"makes a\.qkv_proj of 2 parts where 3 are known"):
        shards_of("a.qkv_proj", ["a.q", "a.k", "a.v"], {}, 8, [8, 8])


def test_a_checkpoint_that_lacks_a_tensor_is_refused_when_vllm_has_loaded_it(vllm):
    torch.manual_seed(0)
    part = factored(8, 6, "rows", 3)
    config = vllm.CLASSES["twofold"]({"a.o_proj": part.settings()})
    tensors = {f"a.o_proj.{name}": tensor for name, tensor in part.state_dict().items()}
    vllm.load({"a.o_proj": vllm.RowLinear(8, [6], False, config, "a.o_proj")}, tensors.items())
    del tensors["a.o_proj.order"]
    with pytest.raises(TwofoldError, match=r"not whole: it lacks 1 tensors of one layer, first a\.o_proj\.order"):
        vllm.load({"a.o_proj": vllm.RowLinear(8, [6], False, config, "a.o_proj")}, tensors.items())


# The entry point


def test_the_entry_point_registers_and_needs_no_vllm_before(vllm):
    line = next(line for line in PYPROJECT.read_text().splitlines() if "twofold.vllm_plugin:" in line)
    name, value = (word.strip(' "') for word in line.split("="))
    register = EntryPoint(name, value, "vllm.general_plugins").load()
    vllm.CLASSES.clear()
    register()
    register()
    config = vllm.CLASSES["twofold"].from_config({"quant_method": "twofold", "modules": {}})
    assert config.get_name() == "twofold" and config.get_config_filenames() == [] and config.get_min_capability() == 0
    assert torch.bfloat16 in config.get_supported_act_dtypes()


def test_without_a_vllm_that_fits_there_is_a_warning():
    from twofold.vllm_plugin.entry import register

    assert not [name for name in sys.modules if name.split(".")[0] == "vllm" or name == vllm_double.OURS]
    with pytest.warns(UserWarning, match="not registered, since this vLLM is not as 0.32 is .*--to dense"):
        register()
