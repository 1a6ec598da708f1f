"""What was loaded from a checkpoint, checked: nothing is missing, and each tensor is as config.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.nn.compact import Compact
from twofold.nn.int_matrix import IntMatrix


def check_shape(weight: str, place: object, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a weight of another shape than config.json says.

    Raises:
        TwofoldError: naming the weight, and the place that it was loaded from.
    """
    if shape != expected:
        raise TwofoldError(
            f"size mismatch: {weight} in {place} is {shape}, its config.json says {expected}; fetch the checkpoint again"
        )


def check_missing(missing: Sequence[str], what: str = "weights", place: object = "", hint: str = "") -> None:
    """Refuse a checkpoint that lacks something.

    Raises:
        TwofoldError: naming the first one.
    """
    if missing:
        raise TwofoldError(
            f"the checkpoint{f' {place}' if place else ''} is not whole: it lacks {len(missing)} {what}, first {missing[0]}; "
            f"fetch it again{hint}"
        )


def check_layers(model: nn.Module) -> None:
    """Refuse numbers of another shape than config.json says, scales that are no numbers, and what was not in the checkpoint.

    transformers 5.16 takes tensors of any shape, and all versions leave missing ones random with a warning.

    Raises:
        TwofoldError: naming the first one.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Compact)}
    integers = {name: module for name, module in model.named_modules() if isinstance(module, IntMatrix)}
    for name, matrix in integers.items():
        if (error := matrix.index_error()) is not None:
            raise TwofoldError(f"{name}.{error}; fetch the checkpoint again")
    _check_arrived(
        {f"{name}.{leaf}": buffer for name, matrix in integers.items() for leaf, buffer in matrix.named_buffers()},
        "parts of its integers",
    )
    children = {f"{name}.{child}": getattr(layer, child) for name, layer in layers.items() for child in layer.CHILDREN}
    factors = {name: child for name, child in children.items() if not isinstance(child, IntMatrix)}
    for name, child in factors.items():
        shape = (child.out_features, child.in_features)
        check_shape(f"the factor {name}", "the checkpoint", tuple(child.weight.shape), shape)
    for name, layer in layers.items():
        if (error := layer.index_error()) is not None:
            raise TwofoldError(f"{name}.{error}; fetch it again")
    _check_arrived({f"{name}.weight": child.weight for name, child in factors.items()}, "factors")


def _check_arrived(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors of which some were not in the checkpoint; if none was, the model was not loaded from one."""
    # Loaded tensors carry this mark; those that transformers filled in do not.
    loaded = {
        name: getattr(tensor, "_is_hf_initialized", False) for name, tensor in tensors.items() if not tensor.is_meta
    }
    missing = [name for name, mark in loaded.items() if not mark]
    if len(missing) < len(loaded):
        check_missing(missing, what)
