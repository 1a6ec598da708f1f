"""Layers in the places of others, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from twofold.nn.layers.shared import SharedLinear


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
    """Give the model the modules again that it had at these places, however the block ends."""
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
    """Give the model its dense layers back within the block, without a copy."""
    factored = {name: replace_module(model, name, module) for name, module in replaced.items()}
    try:
        yield
    finally:
        for name, module in factored.items():
            replace_module(model, name, module)


def stored_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of each weight of floating point that a checkpoint stores, by its name."""
    return {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def cast_weights(model: Any, dtype: torch.dtype, own: Mapping[str, torch.dtype] | None = None) -> None:
    """Cast what a checkpoint stores, in place: parameters and persistent buffers of floating point.

    Other buffers, such as rotary frequencies, stay in the precision that their architecture computes them in.

    Args:
        own: the dtypes of weights that have another one, by name.
    """
    own, stored = own or {}, model.state_dict().keys()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(own.get(name, dtype))
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer.data = buffer.data.to(own.get(name, dtype))


BASES = "twofold_bases"  # where a model holds its bases


def hold_bases(model: nn.Module) -> None:
    """Make a model hold the bases that its layers refer to, and no others.

    They stand in the base model, so that a checkpoint has them under a name that serves every head.

    Raises:
        ValueError: if layers refer to two bases of one name, as when one layer was copied alone.
    """
    home = getattr(model, "base_model", model)
    bases: dict[str, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, SharedLinear) and bases.setdefault(module.basis.name, module.basis) is not module.basis:
            raise ValueError(f"the layers of the model refer to two bases that are called {module.basis.name}")
    if bases:
        setattr(home, BASES, nn.ModuleDict(bases))
    elif hasattr(home, BASES):
        delattr(home, BASES)
