"""Tiny models whose linear layers are all factored, and adapters on them, for several test files."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from conftest import make_model
from twofold.checkpoint.plugin import attach
from twofold.linalg.spectrum import weighted_low_rank
from twofold.model.kinds import dense_weight
from twofold.model.weights import find_targets, list_weights
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import replace_module


def factored_model(architecture: str = "llama", rank: int = 6) -> Any:
    """Return a tiny model all of whose linear layers are factored by plain SVD."""
    model = make_model(architecture)
    for target in find_targets(model).targets:
        module = model.get_submodule(target.name)
        left, right = weighted_low_rank(dense_weight(module).detach(), rank)
        bias = None if module.bias is None else module.bias.detach()
        layer = FactoredLinear.from_factors(left, right, bias, transposed=target.transposed, dtype=torch.float32)
        replace_module(model, target.name, layer)
    attach(model)
    return model


def model_of_form(architecture: str, form: str = "rows", share: float = 0.4, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny model whose layers are factored in one form, or all forms in turn, with biases where it has them."""
    return in_form(make_model(architecture, dtype=torch.float64), form, share, dtype)


def in_form(model: Any, form: str = "rows", share: float = 0.4, dtype: torch.dtype = torch.float32) -> Any:
    """Factorize all layers of a model of float64 in one form, or all forms in turn."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    for i, target in enumerate(list_weights(model).targets):
        module = model.get_submodule(target.name)
        rank = max(1, int(share * min(target.out_features, target.in_features)))
        u, s, v = torch.linalg.svd(dense_weight(module).detach(), full_matrices=False)
        chosen = ("rows", "columns", "plain")[i % 3] if form == "mixed" else form
        layer = FactoredLinear.from_factors(
            u[:, :rank] * s[:rank],
            v[:rank],
            getattr(module, "bias", None),
            chosen,
            target.transposed,  # type: ignore[arg-type]
        )
        assert layer.form == chosen
        replace_module(model, target.name, layer)
    model.to(dtype)
    attach(model)
    return model


def with_lora(model: Any, rank: int = 3, **settings: Any) -> PeftModel:
    """Put LoRA whose product is not zero on every linear layer."""
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False, **settings)
    ).eval()
