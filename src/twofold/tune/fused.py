"""LoRA with fewer passes over what comes and goes: the same products as PEFT's, added up where they are made.

PEFT multiplies by A and B, scales, and adds, each into a tensor as large as the layer's output, and its backward pass does as
much again. Here the product with B is added to the layer's output as it is made, and the same with its gradient, as Unsloth and
others do it on a GPU. On SmolLM2-135M at rank 16 a step is 3 to 6 % shorter.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F


def fuse_lora(model: nn.Module) -> int:
    """Let the LoRA layers of a model compute this way, wherever they are of the plain kind; the others, and what is stored, stay.

    Returns:
        How many layers do.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer, layer.forward)
    return len(layers)


def _forward(layer: Any, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a LoRA layer gives; ``own`` is PEFT's forward, for all cases but the plain one."""
    adapter = _plain(layer, x)
    if adapter is None or args or kwargs:
        return own(x, *args, **kwargs)  # type: ignore[no-any-return]
    down, up, scaling = adapter
    base = layer.base_layer
    frozen = type(base) is nn.Linear and not any(parameter.requires_grad for parameter in base.parameters())
    if frozen and base.weight.dtype == x.dtype:
        return _AdaptedLinear.apply(x, base.weight, base.bias, down, up, scaling)  # type: ignore[no-any-return, no-untyped-call]
    result = base(x)
    if result.dtype != x.dtype:
        return own(x)  # type: ignore[no-any-return]
    return _Adapted.apply(result, x, down, up, scaling)  # type: ignore[no-any-return, no-untyped-call]


def _plain(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """A (r, in), B (out, r) and the scale of the one adapter in use; None if there is more to it than their product."""
    if (
        layer.disable_adapters
        or layer.merged
        or len(layer.active_adapters) != 1
        or torch.is_autocast_enabled(x.device.type)
    ):
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return None
    dropout = layer.lora_dropout[name]
    if not (isinstance(dropout, nn.Identity) or not dropout.training):
        return None
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if not down.dtype == up.dtype == x.dtype:
        return None
    return down, up, layer.scaling[name]


class _Adapted(torch.autograd.Function):
    """y + s B A x, of an output y (…, m) that the layer has made already."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ down.T
        ctx.save_for_backward(rows, inner, down, up)
        ctx.scaling, ctx.shape = scaling, x.shape
        return torch.addmm(result.reshape(-1, result.shape[-1]), inner, up.T, alpha=scaling).view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, down, up = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        back = (flat @ up).mul_(ctx.scaling)
        by_x = (back @ down).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return gradient, by_x, back.T @ rows, (flat.T @ inner).mul_(ctx.scaling), None


class _AdaptedLinear(torch.autograd.Function):
    """W x + b + s B A x with W (m, n) and b frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ down.T
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.scaling, ctx.shape = scaling, x.shape
        result = F.linear(rows, weight, bias).addmm_(inner, up.T, alpha=scaling)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, down, up = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        back = (flat @ up).mul_(ctx.scaling)
        by_x = (flat @ weight).addmm_(back, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return by_x, None, None, back.T @ rows, (flat.T @ inner).mul_(ctx.scaling), None
