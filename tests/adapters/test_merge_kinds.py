"""Adapters of every kind, merged: what is written, read by plain transformers, computes what the adapters beside the model do."""

from __future__ import annotations

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
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig

from conftest import make_model
from factored import factored_model
from twofold.adapters.merge import merge
from twofold.errors import TwofoldError

pytestmark = pytest.mark.filterwarnings("ignore")
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
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }


REFUSED = {"prefix", "prompt"}  # no weights
KINDS = sorted(configs("llama"))


def adapter(folder: Path, base: Path, auto: Any, config: Any, seed: int = 1) -> None:
    """Write an adapter none of whose weights is what it began with."""
    torch.manual_seed(seed)
    adapted = get_peft_model(auto.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or (getattr(config, "bias", "") == "all" and name.endswith(".bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_merged_computes_what_the_adapter_does(name: str, kind: str, tmp_path: Path) -> None:
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    MODELS[name]().save_pretrained(tmp_path / "base")
    try:
        adapter(tmp_path / "adapter", tmp_path / "base", auto, configs(name)[kind])
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError, KeyError) as error:
        pytest.skip(f"PEFT has no such adapter for this model: {error}")
    try:
        merge(str(tmp_path / "base"), str(tmp_path / "adapter"), tmp_path / "merged")
    except TwofoldError as error:
        print("REFUSED", name, kind, error)
        return
    meant = logits(PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter"))
    written = auto.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(written), meant, rtol=1e-4, atol=1e-4)
    assert float((meant - logits(auto.from_pretrained(tmp_path / "base"))).abs().max()) > 1e-3  # it changes something
    assert kind not in REFUSED
