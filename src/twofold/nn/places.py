"""Layers in the places of others, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from twofold.nn.compact_linear import CompactLinear
from twofold.nn.shared_linear import hold_bases


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in the place of another and give back the old one."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, child)
    module.train(old.training)
    setattr(parent, child, module)
    return old  # type: ignore[no-any-return]


@contextmanager
def put_back(model: nn.Module, names: list[str]) -> Iterator[None]:
    """After the block the model has the same modules again at these places, however the block ends."""
    before = {name: model.get_submodule(name) for name in names}
    try:
        yield
    finally:
        for name, module in before.items():
            if model.get_submodule(name) is not module:
                replace_module(model, name, module)
        hold_bases(model)


@contextmanager
def dense_again(model: nn.Module, replaced: dict[str, nn.Module]) -> Iterator[None]:
    """Within the block the model has its dense layers back, with no copy made."""
    factored = {name: replace_module(model, name, module) for name, module in replaced.items()}
    try:
        yield
    finally:
        for name, module in factored.items():
            replace_module(model, name, module)


def dense_module(layer: CompactLinear, dtype: torch.dtype | None = None) -> nn.Module:
    """The dense layer that computes the same, of the kind that the architecture has at that place."""
    weight = layer.to_dense().to(dtype or layer.weight.dtype)
    dense: nn.Module
    if layer.transposed:
        dense = Conv1D(layer.out_features, layer.in_features).to(weight.device, weight.dtype)
        dense.weight = nn.Parameter(weight.T.contiguous())
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach().to(weight.dtype))
        return dense
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=weight.dtype)
    dense.weight = nn.Parameter(weight)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(weight.dtype))
    return dense


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast what a checkpoint stores, in place: parameters and persistent buffers of floating point.

    Other buffers, such as rotary frequencies, stay in the precision that their architecture computes them in.
    """
    stored = model.state_dict().keys()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
