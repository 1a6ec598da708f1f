"""Models whose blocks share bases, for several test files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import tiny
import twofold
from conftest import TEXT, VOCABULARY, make_model
from twofold.model.target import Target
from twofold.nn.layers.shared import SharedLinear

IDS = torch.arange(20)[None]


def target(name: str, m: int, n: int) -> Target:
    """Return a weight of ``nn.Linear`` without a bias."""
    return Target(name, m, n, False, False)


def deep(layers: int = 5, **settings: Any) -> Any:
    """Return a tiny Llama of several blocks."""
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


def shared_model(model: Any = "llama", keep: float = 0.6, **settings: Any) -> Any:
    """Factorize a model, or one of an architecture, on bases that its blocks share."""
    settings = {"texts": [TEXT], "tokens": 256, "window": 32, "quiet": True, "objective": "basis-sharing"} | settings
    if not settings.keys() & {"budget", "kl_at_most", "perplexity_at_most"}:
        settings["keep"] = keep
    return twofold.factorize(make_model(model) if isinstance(model, str) else model, tiny.tokenizer(), **settings)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def shared_layers(model: Any) -> dict[str, SharedLinear]:
    """Return the layers of a model that share bases."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SharedLinear)}
