"""Weights and moments as the closed forms of structures need them, and the sliced layers that are made of them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.linalg.metric import damp, working_dtype
from twofold.model.kinds import dense_weight
from twofold.nn.layers.sliced import SlicedForm, SlicedLinear
from twofold.objectives import LayerMoments

Layer = TypeVar("Layer", bound=nn.Module)

LEAST_DAMPING = 1e-6  # of a moment that is inverted; below it, one that was summed in float32 is noise


def working(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 where the device has it."""
    return tensor.to(working_dtype(tensor.device))


def wide(module: nn.Module) -> Tensor:  # (out, in)
    """Return the weight of a layer in the working precision."""
    return working(dense_weight(module).detach())


def with_bias(module: nn.Module) -> Tensor:  # (out, in + 1)
    """Return the weight of a layer with its bias (or zeros) as the last column: what it does to (x, 1)."""
    weight = wide(module)
    bias = getattr(module, "bias", None)
    column = weight.new_zeros(len(weight)) if bias is None else working(bias.detach())
    return torch.cat([weight, column[:, None]], 1)


def with_one(moments: LayerMoments, damping: float, device: torch.device) -> Tensor:  # (in + 1, in + 1)
    """Return E[z zᵀ] of z = (x, 1), with the moment of x damped."""
    assert moments.input is not None and moments.input_mean is not None
    moment, mean = working(moments.input.to(device)), working(moments.input_mean.to(device))
    top = torch.cat([damp(moment, damping), mean[:, None]], 1)
    return torch.cat([top, torch.cat([mean, mean.new_ones(1)])[None]])


def definite(
    moments: LayerMoments, damping: float, device: torch.device
) -> tuple[Tensor, Tensor, float]:  # (in, in), (in, in)
    """Return the damped C, its Cholesky factor, and the damping: ten times more where noise left C indefinite."""
    assert moments.input is not None
    moment, damping = working(moments.input.to(device)), max(damping, LEAST_DAMPING)
    while True:
        damped = damp(moment, damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0 or not torch.isfinite(damped).all():
            return damped, factor, damping
        damping *= 10


def energy(
    missing: Tensor,  # W − W′ (out, in)
    moment: Tensor,  # C (in, in)
) -> float:
    """Return E‖(W − W′) x‖²."""
    return float((missing @ moment * missing).sum())


def settle(layer: Layer, module: nn.Module) -> Layer:
    """Let a layer compute in the dtype of the dense one whose place it takes, and be trained if that is."""
    layer.to(dense_weight(module).dtype)
    return layer.requires_grad_(any(p.requires_grad for p in module.parameters()))


def part_of(
    module: nn.Module,  # the dense layer
    form: SlicedForm,
    part: Tensor,  # (kept, in) for rows, (out, kept) for columns
    index: Tensor,  # (kept,), ascending
    stored: torch.dtype,
    bias: Tensor | None = None,  # (out,), in the place of the layer's own
) -> SlicedLinear:
    """Return the sliced layer in the place of a dense one: rounded to the dtype that is stored, computing in that of the layer.

    The bias of a row that is not kept is zero.
    """
    own = getattr(module, "bias", None)
    bias = own.detach() if bias is None and own is not None else bias
    if bias is not None and form == "kept-rows":
        bias = torch.zeros_like(bias).index_copy(0, index.to(bias.device), bias[index])
    size = dense_weight(module).shape[0 if form == "kept-rows" else 1]
    layer = SlicedLinear.from_part(part.detach(), index, size, form, bias, isinstance(module, Conv1D), dtype=stored)
    return settle(layer, module)
