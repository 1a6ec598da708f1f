"""Adapters of every kind, merged: what is written, read by plain transformers, computes what the adapters beside the model do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig

from conftest import make_model
from factored import factored_model
from twofold.adapters.extract import extract
from twofold.adapters.merge import merge
from twofold.errors import TwofoldError

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
IDS = torch.arange(3, 40)[None]
WRITES = {"task_type": "CAUSAL_LM"}


def bert() -> Any:
    """A masked language model: a head that is tied, and so is its bias."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def untied() -> Any:
    """A model whose head is its own, though its configuration says that it is tied."""
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    return model


MODELS: dict[str, Any] = {
    "llama": make_model, "mistral": lambda: make_model("mistral"), "both": untied, "gpt2": lambda: make_model("gpt2"),
    "bert": bert, "factored": factored_model,
}  # fmt: skip
HEAD, TABLE = {"gpt2": "lm_head", "bert": "decoder"}, {"gpt2": "wte", "bert": "word_embeddings"}
LAYER = {"gpt2": "c_attn", "bert": "query"}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def configs(model: str) -> dict[str, Any]:
    """Return adapters of every kind for a model."""
    head, table, layer = HEAD.get(model, "lm_head"), TABLE.get(model, "embed_tokens"), LAYER.get(model, "q_proj")
    norm, other = {"gpt2": ("ln_f", "c_proj"), "bert": ("LayerNorm", "value")}.get(model, ("norm", "v_proj"))
    lora: dict[str, Any] = {"r": 3, "init_lora_weights": False}
    writes = {} if model == "bert" else WRITES
    of = lambda **more: LoraConfig(**(lora | {"target_modules": [layer]} | writes | more))  # noqa: E731
    return {
        "head": of(target_modules=[layer, head]),
        "table": of(target_modules=[layer, table]),
        "both tables": of(target_modules=[head, table]),
        "tied tables": of(target_modules=[layer, table], ensure_weight_tying=True),
        "head saved": of(modules_to_save=[head]),
        "table saved": of(modules_to_save=[table]),
        "norm saved": of(modules_to_save=[norm]),
        "tokens": of(trainable_token_indices=[3, 7]),
        "tokens alone": TrainableTokensConfig(token_indices=[5, 9], target_modules=[table], **writes),
        "rslora": of(use_rslora=True, lora_alpha=5),
        "dora": of(use_dora=True),
        "dora on the table": of(use_dora=True, target_modules=[layer, table]),
        "patterns": of(target_modules=[layer, other], rank_pattern={layer: 2}, alpha_pattern={other: 7}),
        "bias all": of(bias="all"),
        "bias of lora": of(bias="lora_only", target_modules=[layer, other]),
        "bias in lora": of(lora_bias=True),
        "one layer": of(layers_to_transform=[1]),
        "turned": of(fan_in_fan_out=True),
        "ia3": IA3Config(target_modules=[other], feedforward_modules=[], **writes),
        "loha": LoHaConfig(r=2, target_modules=[layer], init_weights=False, **writes),
        "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=[layer], **writes),
        "vblora": VBLoRAConfig(
            r=2,
            num_vectors=8,
            vector_length=8,
            topk=2,
            target_modules=[layer, other],
            save_only_topk_weights=False,
            **writes,
        ),
        "repeated": of(layer_replication=[[0, 2], [1, 2]]),
        "drawn": of(init_lora_weights="pissa_niter_2"),
        "olora": of(init_lora_weights="olora"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }


REFUSED = {
    "repeated": "repeats layers of the model", "drawn": r"began with init_lora_weights='pissa_niter_2'.*as plain LoRA",
    "prefix": "changes no weights", "prompt": "changes no weights", "bias in lora": "has no bias|layer has none",
    # PEFT's own layer leaves out the bias of a head; merged, the model would have it.
    ("bert", "tokens"): "computes something else", ("bert", "tokens alone"): "computes something else",
}  # fmt: skip
ABOUT_TIES = ("head", "table", "both tables", "tied tables", "head saved", "table saved", "tokens", "tokens alone")
KINDS = [("llama", kind) for kind in configs("llama")]
KINDS += [(name, kind) for name in ("both", "gpt2", "bert") for kind in (*ABOUT_TIES, "bias all")]
KINDS += [
    ("gpt2", "turned"),
    ("gpt2", "patterns"),
    ("gpt2", "bias in lora"),
    ("mistral", "tied tables"),
    ("mistral", "head"),
]
KINDS += [
    ("factored", kind) for kind in ("head", "table saved", "patterns", "bias of lora", "one layer", "bias in lora")
]


def adapter(folder: Path, base: Path, auto: Any, config: Any, seed: int = 1) -> None:
    """Write an adapter none of whose weights is what it began with."""
    torch.manual_seed(seed)
    adapted = get_peft_model(auto.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or (getattr(config, "bias", "") == "all" and name.endswith(".bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model on the disk."""
    place = tmp_path_factory.mktemp("bases")
    for name, make in MODELS.items():
        make().save_pretrained(place / name)
    return {name: place / name for name in MODELS}


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_what_is_merged_computes_what_the_adapter_does(
    name: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    base = bases[name]
    adapter(tmp_path / "adapter", base, auto, configs(name)[kind])
    refused = REFUSED.get((name, kind)) or (REFUSED.get(kind) if name != "gpt2" else None)
    if refused is not None:
        with pytest.raises(TwofoldError, match=refused):
            merge(str(base), str(tmp_path / "adapter"), tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    merge(str(base), str(tmp_path / "adapter"), tmp_path / "merged")
    meant = logits(PeftModel.from_pretrained(auto.from_pretrained(base), tmp_path / "adapter"))
    written = auto.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(written), meant, rtol=1e-4, atol=1e-4)
    assert float((meant - logits(auto.from_pretrained(base))).abs().max()) > 1e-3  # it changes something


def test_several_adapters_add_up_with_what_each_has_saved(tmp_path: Path) -> None:
    """The weights that the second one has saved count too; of one module there can't be two."""
    make_model().save_pretrained(tmp_path / "base")
    base, kinds = str(tmp_path / "base"), configs("llama")
    for number, kind in enumerate(
        ("rslora", "head saved", "norm saved", "table", "head", "tokens", "bias all", "patterns")
    ):
        adapter(tmp_path / kind, tmp_path / "base", AutoModelForCausalLM, kinds[kind], seed=number)
    for names in (
        ("rslora", "head saved"),
        ("norm saved", "head saved"),
        ("table", "head"),
        ("patterns", "bias all"),
    ):
        paths = [str(tmp_path / name) for name in names]
        sums = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), paths[0], adapter_name="0")
        for number, path in enumerate(paths[1:], 1):
            sums.load_adapter(path, adapter_name=str(number))
        sums.base_model.set_adapter([str(number) for number in range(len(paths))])
        merge(base, paths, tmp_path / "-".join(names))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "-".join(names))
        torch.testing.assert_close(logits(merged), logits(sums), rtol=1e-4, atol=1e-4)
    adapter(tmp_path / "other head", tmp_path / "base", AutoModelForCausalLM, configs("llama")["head saved"], seed=9)
    with pytest.raises(TwofoldError, match=r"head saved and \S*other head each have .* place of lm_head, which"):
        merge(base, [str(tmp_path / "head saved"), str(tmp_path / "other head")], tmp_path / "x")
    with pytest.raises(TwofoldError, match=r"trains tokens.*merge one, and the other into what is written"):
        merge(base, [str(tmp_path / "patterns"), str(tmp_path / "tokens")], tmp_path / "x")
    for kind, words in {
        "head saved": "modules_to_save",
        "tokens": "trainable_token_indices",
        "bias all": "bias",
    }.items():
        with pytest.raises(TwofoldError, match=f"has {words}, weights that take the place.*leave `weight` out"):
            merge(base, [str(tmp_path / kind)], tmp_path / "x", weight=[0.5])
        with pytest.raises(TwofoldError, match="is no plain LoRA"):
            merge(base, [str(tmp_path / kind)], tmp_path / "x", adapter_rank=2)
    with pytest.raises(TwofoldError, match=r"changes the embedding model\.embed_tokens"):
        merge(base, [str(tmp_path / "table")], tmp_path / "x", adapter_rank=2)
    assert not (tmp_path / "x").exists()


def test_an_adapter_of_which_something_is_missing_or_not_taken_is_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    adapter(tmp_path / "one", tmp_path / "base", AutoModelForCausalLM, configs("llama")["patterns"])
    file = tmp_path / "one" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    for change, words in (
        ({name: tensor for name, tensor in tensors.items() if name != first}, "lacks 1 weights"),
        (tensors | {first.replace("layers.0", "layers.7"): tensors[first].clone()}, "has no place for, 1 weights"),
    ):
        save_file(change, file, {"format": "pt"})
        with pytest.raises(TwofoldError, match=words):
            merge(str(tmp_path / "base"), str(tmp_path / "one"), tmp_path / "x")


def test_a_broken_adapter_is_told_as_one(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    adapter(tmp_path / "one", tmp_path / "base", AutoModelForCausalLM, configs("llama")["patterns"])
    config, file = tmp_path / "one" / "adapter_config.json", tmp_path / "one" / "adapter_model.safetensors"
    good, whole = config.read_text(), file.read_bytes()
    settings = json.loads(good)
    for text, words in {
        "{": r"adapter_config\.json can't be read \(.*fetch or save the adapter again",
        "[]": "names no kind of adapter",
        "{}": "names no kind of adapter",
        json.dumps(settings | {"init_lora_weights": "corda"}): "began with init_lora_weights='corda'",
        json.dumps(settings | {"init_lora_weights": "lora_ga"}): "began with init_lora_weights='lora_ga'",
    }.items():
        config.write_text(text)
        with pytest.raises(TwofoldError, match=words):
            merge(str(tmp_path / "base"), str(tmp_path / "one"), tmp_path / "x")
    config.write_text(good)
    file.write_bytes(whole[:-8])
    with pytest.raises(TwofoldError, match=r"one can't be read: .*fetch or save it again"):
        merge(str(tmp_path / "base"), str(tmp_path / "one"), tmp_path / "x")
    file.write_bytes(whole)
    save_file({name: tensor / 0 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(TwofoldError, match=r"lora_A\.weight of the adapter \S+one holds NaN or infinity"):
        merge(str(tmp_path / "base"), str(tmp_path / "one"), tmp_path / "x")


@pytest.mark.parametrize("kind", ["patterns", "table saved", "head saved", "table", "head"])
def test_an_adapter_that_was_trained_with_more_tokens_says_so(kind: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    larger = make_model()
    larger.resize_token_embeddings(272)
    get_peft_model(larger, configs("llama")[kind]).save_pretrained(tmp_path / "one", save_embedding_layers=True)
    words = r"trained with 272 tokens, and the model has 264; .*resize_token_embeddings\(272\)"
    with pytest.raises(TwofoldError, match=words):
        merge(str(tmp_path / "base"), str(tmp_path / "one"), tmp_path / "x")


def test_one_adapter_of_a_model_that_writes_no_text_loads_again(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    adapter(tmp_path / "one", tmp_path / "base", AutoModelForMaskedLM, configs("bert")["patterns"])
    merge(str(tmp_path / "base"), str(tmp_path / "one"), tmp_path / "again", adapter_rank=3)
    meant, got = (
        logits(PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(tmp_path / "base"), tmp_path / name))
        for name in ("one", "again")
    )
    torch.testing.assert_close(got, meant, rtol=1e-4, atol=1e-4)


def test_what_an_extracted_adapter_leaves_out_is_said(tmp_path: Path) -> None:
    """A head that is tied in the one and not in the other model is no weight of the adapter."""
    base, tuned = untied(), make_model()
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight[:, :1] += 0.1
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    for first, second in (("base", "tuned"), ("tuned", "base")):
        made = extract(str(tmp_path / second), str(tmp_path / first), tmp_path / f"out-{first}", energy=1.0, quiet=True)
        assert "lm_head.weight" in made.notes[0]
