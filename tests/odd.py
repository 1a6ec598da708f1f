"""Odd checkpoints, as people really have them: each is a good one with something done to it.

The weights of the good one have few ranks, so that a factorization at the sizes of the tests loses nothing: the logits of
whatever is written are those of the odd folder as plain transformers loads it, within rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
)

import tiny
from conftest import VOCABULARY, make_tokenizer

RANK = 6
SHAPE = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, Tensor]


def of_few_ranks(model: Any) -> Any:
    """Give each linear layer of a model random weights of a low rank."""
    generator = torch.Generator().manual_seed(0)
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() != 2 or id(parameter) in tables:
                continue
            m, n = parameter.shape
            left, right = (torch.randn(*shape, generator=generator) for shape in ((m, RANK), (RANK, n)))
            parameter.copy_(left @ right / (RANK * n) ** 0.5)
    return model.eval()


def llama(**settings: Any) -> Any:
    """Return a tiny Llama, tied unless the settings say otherwise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, **{"tie_word_embeddings": True, **settings},
    )  # fmt: skip
    return of_few_ranks(AutoModelForCausalLM.from_config(config))


def save(folder: Path, model: Any = None, **settings: Any) -> Path:
    """Write a good checkpoint."""
    (model if model is not None else llama()).save_pretrained(folder, **settings)
    make_tokenizer().save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a checkpoint of one file."""
    path = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, {"format": "pt"})


def configure(folder: Path, drop: tuple[str, ...] = (), **settings: Any) -> None:
    """Change config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def cast(tensors: Tensors, dtype: torch.dtype, *apart: str) -> Tensors:
    """Cast tensors, but for those whose names hold one of some words."""
    return {n: t if any(word in n for word in apart) else t.to(dtype) for n, t in tensors.items()}


@dataclass(frozen=True)
class Odd:
    """An odd checkpoint.

    Args:
        make: makes it in a folder.
        refused: words that the one sentence holds by which it is refused; None if it is worked on.
        flags: that it takes.
        unused: how many tensors of its files are not in a result.
        loads: the class that loads it.
        half: whether its numbers have 16 bits.
        adapts: the kind of layer that an adapter is put on.
    """

    make: Callable[[Path], None]
    refused: str | None = None
    flags: tuple[str, ...] = ()
    unused: int = 0
    loads: Any = field(default=AutoModelForCausalLM)
    half: bool = False
    adapts: str = "q_proj"


ODD: dict[str, Odd] = {}


def altered(change: Callable[[Tensors], Tensors], config: dict[str, Any] | None = None, **model: Any) -> Any:
    """Return a maker of a folder whose tensors and configuration are changed."""

    def make(folder: Path) -> None:
        save(folder, llama(**model))
        edit(folder, change)
        configure(folder, **(config or {}))

    return make


def other(tensors: Tensors) -> Tensor:
    """Return a head of its own, of the shape of the table."""
    return torch.randn(tensors[EMBED].shape, generator=torch.Generator().manual_seed(1)).to(tensors[EMBED].dtype)


def same(tensors: Tensors) -> Tensors:
    return tensors


def add(**tables: Any) -> None:
    for name, (make, settings) in tables.items():
        ODD[name.replace("_", " ")] = Odd(make, **settings)


# What is tied, and what is not.
add(
    tied=(altered(same), {}),
    untied=(altered(same, tie_word_embeddings=False), {}),
    tied_and_saved_twice=(altered(lambda t: t | {HEAD: t[EMBED].clone()}), {"unused": 1}),
    tied_and_trained_apart=(altered(lambda t: t | {HEAD: other(t)}), {}),
    tied_and_only_the_head_is_there=(altered(lambda t: {HEAD if n == EMBED else n: x for n, x in t.items()}), {}),
    untied_and_saved_twice=(altered(lambda t: t | {HEAD: t[EMBED].clone()}, tie_word_embeddings=False), {}),
    untied_and_the_head_is_missing=(
        altered(lambda t: {n: x for n, x in t.items() if n != HEAD}, tie_word_embeddings=False), {"refused": "lm_head.weight"},
    ),
    no_word_on_ties=(altered(same, {"drop": ("tie_word_embeddings",)}, tie_word_embeddings=False), {}),
)  # fmt: skip
# The dtypes of config.json and of the tensors.
BF16 = partial(cast, dtype=torch.bfloat16)


def mixed(*words: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: cast(tensors, torch.bfloat16, *words)


add(
    says_bfloat16_is_float32=(altered(same, {"dtype": "bfloat16"}), {}),
    says_float32_is_bfloat16=(altered(mixed()), {"half": True}),
    says_float16_is_bfloat16=(altered(mixed(), {"dtype": "float16"}), {"half": True}),
    float16=(altered(lambda t: cast(t, torch.float16), {"dtype": "float16"}), {"half": True}),
    float64=(altered(lambda t: cast(t, torch.float64), {"dtype": "float64"}), {}),
    no_dtype=(altered(same, {"drop": ("dtype",)}), {}),
    the_old_name_of_the_dtype=(altered(mixed(), {"drop": ("dtype",), "torch_dtype": "bfloat16"}), {"half": True}),
    norms_in_float32=(altered(mixed("norm"), {"dtype": "bfloat16"}), {"half": True}),
    embeddings_in_float32=(altered(mixed("embed"), {"dtype": "bfloat16"}), {"half": True}),
    a_projection_in_float32=(altered(mixed("layers.0.mlp.up_proj"), {"dtype": "bfloat16"}), {"half": True}),
    a_table_of_another_dtype_that_is_saved_twice=(
        altered(lambda t: cast(t | {HEAD: t[EMBED].clone()}, torch.bfloat16, "embed", "lm_head")), {"half": True, "unused": 1},
    ),
    a_head_of_another_dtype=(
        altered(lambda t: cast(t, torch.bfloat16, "lm_head"), {"dtype": "bfloat16"}, tie_word_embeddings=False), {"half": True},
    ),
)  # fmt: skip
# Tensors too many, or too few.
add(
    old_rotary_buffers=(
        altered(lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}),
        {"unused": 2},
    ),
    a_head_for_further_tokens=(altered(lambda t: t | {"mtp.0.proj.weight": torch.ones(32, 64)}), {"unused": 1}),
    a_value_head=(altered(lambda t: t | {"v_head.summary.weight": torch.ones(1, 32)}), {"unused": 1}),
    biases_that_the_class_does_not_take=(
        altered(lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), {"unused": 1},
    ),
    a_layer_too_many=(
        altered(lambda t: t | {"model.layers.2.input_layernorm.weight": torch.ones(32)}), {"refused": "more layers"},
    ),
    a_norm_is_missing=(altered(lambda t: {n: x for n, x in t.items() if n != "model.norm.weight"}), {"refused": "model.norm"}),
    a_layer_is_missing=(altered(lambda t: {n: x for n, x in t.items() if "layers.1." not in n}), {"refused": "layers.1."}),
    a_tensor_is_half=(altered(lambda t: t | {EMBED: t[EMBED][:100]}), {"refused": "embed_tokens"}),
    a_weight_is_nan=(altered(lambda t: t | {"model.norm.weight": torch.full((32,), float("nan"))}), {"refused": "NaN"}),
    integers_for_numbers=(
        altered(lambda t: t | {"model.norm.weight": torch.ones(32, dtype=torch.int32)}), {"refused": "type I32"},
    ),
)  # fmt: skip
# Other names.
add(
    names_without_prefix=(altered(lambda t: {n.removeprefix("model."): x for n, x in t.items()}), {}),
    names_of_torch_compile=(altered(lambda t: {f"_orig_mod.{n}": x for n, x in t.items()}), {"refused": "torch.compile"}),
    names_of_data_parallel=(altered(lambda t: {f"module.{n}": x for n, x in t.items()}), {"refused": "module."}),
    names_of_peft=(
        altered(lambda t: {f"base_model.model.{n}": x for n, x in t.items()}), {"refused": "PEFT"},
    ),
    no_architecture=(altered(same, {"drop": ("architectures",)}), {}),
    unknown_keys_in_the_config=(altered(same, {"unsloth_version": "2026.1", "pretraining_tp": 1}), {}),
    the_vocabulary_is_padded=(
        altered(lambda t: t | {EMBED: torch.cat([t[EMBED], t[EMBED][:24]])}, {"vocab_size": VOCABULARY + 24}), {},
    ),
)  # fmt: skip


# Files.
def sharded(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    save(folder, max_shard_size="30KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if change is not None:
        change(index)
    path.write_text(json.dumps(index))


def _lacks_a_shard(index: dict[str, Any]) -> None:
    index["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"


def _promises_more(index: dict[str, Any]) -> None:
    index["weight_map"]["model.more.weight"] = "model-00001-of-00004.safetensors"


def _forgets_some(index: dict[str, Any]) -> None:
    index["weight_map"].pop("model.norm.weight")


def _both(folder: Path) -> None:
    """A single file, and the index and shards of an earlier state."""
    sharded(folder)
    llama().save_pretrained(folder / "whole")
    (folder / "whole" / "model.safetensors").rename(folder / "model.safetensors")
    shutil.rmtree(folder / "whole")


def _pickle_beside(folder: Path) -> None:
    save(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not read")


def _pickle_alone(folder: Path) -> None:
    save(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut_short(folder: Path) -> None:
    path = save(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _broken_config(folder: Path) -> None:
    (save(folder) / "config.json").write_text("{")


def _list_config(folder: Path) -> None:
    (save(folder) / "config.json").write_text("[]")


add(
    sharded=(sharded, {}),
    a_stale_index_beside_a_file=(_both, {}),
    a_shard_is_missing=(partial(sharded, change=_lacks_a_shard), {"refused": "lacks 1 of"}),
    the_index_promises_more=(partial(sharded, change=_promises_more), {"refused": "model.more.weight"}),
    the_index_forgets_some=(partial(sharded, change=_forgets_some), {}),
    a_pickle_beside=(_pickle_beside, {}),
    a_pickle_alone=(_pickle_alone, {"refused": "safetensors"}),
    cut_short=(_cut_short, {"refused": "fetch it again"}),
    a_broken_config=(_broken_config, {"refused": "config.json"}),
    a_list_for_a_config=(_list_config, {"refused": "config.json"}),
)  # fmt: skip


def _settings(name: str, text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (save(folder) / name).write_text(text)

    return make


def _files(folder: Path) -> None:
    save(folder)
    for name in ("LICENSE", "modules.json", "preprocessor_config.json", "USE_POLICY.md"):
        (folder / name).write_text("{}")


# Files beside the weights.
add(
    stop_strings=(_settings("generation_config.json", '{"stop_strings": ["###"], "eos_token_id": 257}'), {}),
    a_cache_of_another_kind=(_settings("generation_config.json", '{"cache_implementation": "quantized"}'), {}),
    a_broken_generation_config=(_settings("generation_config.json", "{"), {}),
    files_beside=(_files, {}),
)  # fmt: skip

OWN = (
    "from transformers import LlamaForCausalLM\nfrom .configuration_mine import MineConfig\n"
    "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
)
OWN_CONFIG = "from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"


def _own_code(folder: Path) -> None:
    save(folder)
    (folder / "modeling_mine.py").write_text(OWN)
    (folder / "configuration_mine.py").write_text(OWN_CONFIG)
    own = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    configure(folder, model_type="mine", architectures=["MineForCausalLM"], auto_map=own)


add(
    own_code=(_own_code, {"flags": ("--trust-remote-code",)}),
    own_code_without_leave=(_own_code, {"refused": "trust-remote-code"}),
)  # fmt: skip


# Adapters, and what is quantized.
def adapter(folder: Path, base: Path, layer: str = "q_proj") -> Path:
    """Write a LoRA that changes something."""
    model = load(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[layer], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return folder


def _adapter_alone(folder: Path) -> None:
    adapter(folder, save(folder.parent / f"{folder.name}-base"))


def _adapter_with_config(folder: Path) -> None:
    _adapter_alone(folder)
    shutil.copy(folder.parent / f"{folder.name}-base" / "config.json", folder)


def quantized(method: Any) -> Callable[[Path], None]:
    return altered(same, {"quantization_config": method})


def _fp8(folder: Path) -> None:
    save(folder)

    def change(tensors: Tensors) -> Tensors:
        scales = {n.replace(".weight", ".weight_scale_inv"): torch.ones(1, 1) for n in tensors if "proj" in n}
        return {n: t.to(torch.float8_e4m3fn if "proj" in n else torch.bfloat16) for n, t in tensors.items()} | scales

    edit(folder, change)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    configure(folder, quantization_config=settings)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
add(
    an_adapter=(_adapter_alone, {"refused": "adapter"}),
    an_adapter_with_a_config=(_adapter_with_config, {"refused": "adapter"}),
    bitsandbytes=(quantized(BNB), {"refused": "bitsandbytes"}),
    gptq=(quantized({"quant_method": "gptq", "bits": 4, "group_size": 128}), {"refused": "gptq"}),
    awq=(quantized({"quant_method": "awq", "bits": 4, "group_size": 128}), {"refused": "awq"}),
    fp8=(_fp8, {"refused": "fp8"}),
    an_unknown_quantizer=(quantized({"quant_method": "mine"}), {"refused": "mine"}),
    no_quantization=(quantized(None), {}),
)  # fmt: skip


# Other architectures.
def _bert(folder: Path) -> None:
    config = BertConfig(
        vocab_size=VOCABULARY + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=258,
    )  # fmt: skip
    torch.manual_seed(0)
    save(folder, of_few_ranks(BertForMaskedLM(config)))
    tiny.tokenizer().save_pretrained(folder)  # with a mask


def _gpt2(folder: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    save(folder, of_few_ranks(AutoModelForCausalLM.from_config(config)))
    edit(folder, lambda t: {n.removeprefix("transformer."): x for n, x in t.items()})


def _gpt2_masks(folder: Path) -> None:
    _gpt2(folder)
    edit(folder, lambda t: t | {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)})


def _deepseek(folder: Path) -> None:
    """A layer for further tokens, which the class leaves out by a rule of its own."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SHAPE, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
        max_position_embeddings=64,
    )  # fmt: skip
    save(folder, of_few_ranks(AutoModelForCausalLM.from_config(config)))
    further = {"input_layernorm.weight": torch.ones(32), "eh_proj.weight": torch.ones(32, 64)}
    edit(folder, lambda t: t | {f"model.layers.61.{name}": tensor for name, tensor in further.items()})


add(
    bert_whose_bias_is_tied=(_bert, {"loads": BertForMaskedLM}),
    gpt2_with_old_names=(_gpt2, {"adapts": "c_attn"}),
    gpt2_with_masks=(_gpt2_masks, {"adapts": "c_attn", "unused": 2}),
    layers_that_a_class_leaves_out=(_deepseek, {"adapts": "o_proj", "unused": 2}),
)  # fmt: skip


IDS = torch.arange(3, 40)[None]


def load(folder: Path, loads: Any = AutoModelForCausalLM) -> Any:
    """Load a checkpoint by plain transformers, in float32."""
    trusted = (folder / "modeling_mine.py").exists()
    return loads.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trusted)


@torch.no_grad()
def logits_of(folder: Path | Any, loads: Any = AutoModelForCausalLM) -> Tensor:
    """Return the logits of a model, or of a checkpoint as plain transformers loads it."""
    model = load(folder, loads) if isinstance(folder, Path) else folder
    return model.eval()(input_ids=IDS).logits.float()  # type: ignore[no-any-return]
