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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def fuse_lora(model: nn.Module) -> int:
    """Let the plain LoRA layers of a model compute this way; return how many do. The others, and what is stored, stay."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer, layer.forward)
    return len(layers)


def _forward(layer: Any, own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute what a LoRA layer gives; ``own`` is PEFT's forward, for all cases but the plain one."""
    adapter = _plain(layer, x)
    if adapter is None or args or kwargs:
        return own(x, *args, **kwargs)  # type: ignore[no-any-return]
    down, up, scaling = adapter
    base = layer.base_layer
    rows = x.reshape(-1, x.shape[-1])
    if _is_frozen(base) and base.weight.dtype == x.dtype:
        fused: Tensor = _AdaptedLinear.apply(rows, base.weight, base.bias, down, up, scaling)  # type: ignore[no-untyped-call]
        return fused.view(*x.shape[:-1], base.out_features)
    result = base(x)
    if result.dtype != x.dtype:
        return own(x)  # type: ignore[no-any-return]
    wide = result.shape[-1]
    # Flat, and viewed outside: what a function gives may be worked on in place (OLMo clamps its queries so), a view of it not.
    summed: Tensor = _Adapted.apply(result.reshape(-1, wide), rows, down, up, scaling)  # type: ignore[no-untyped-call]
    return summed.view(*x.shape[:-1], wide)


def _is_frozen(base: nn.Module) -> bool:
    """Tell whether a layer is a plain product with a plain tensor, which no one trains or looks at on the way."""
    return (
        type(base) is nn.Linear
        and type(base.weight) is nn.Parameter  # torchao's are of other classes
        and type(base.weight.data) is Tensor
        and not any(parameter.requires_grad for parameter in base.parameters())
        and not (base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__)
    )


def _plain(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """Return A (r, in), B (out, r) and the scale of the one adapter in use; None if there is more to it than their product."""
    if layer.disable_adapters or layer.merged or torch.is_autocast_enabled(x.device.type):
        return None
    if len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return None
    dropout, down, up = layer.lora_dropout[name], layer.lora_A[name].weight, layer.lora_B[name].weight
    drops = dropout.training and not isinstance(dropout, nn.Identity)
    return None if drops or not down.dtype == up.dtype == x.dtype else (down, up, layer.scaling[name])


class _Adapted(torch.autograd.Function):
    """y + s B A x, of an output y (rows, m) that the layer has made already."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        inner = x @ down.T
        ctx.save_for_backward(x, inner, down, up)
        ctx.scaling = scaling
        return torch.addmm(result, inner, up.T, alpha=scaling)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, down, up = ctx.saved_tensors
        back = (gradient @ up).mul_(ctx.scaling)
        by_x = back @ down if ctx.needs_input_grad[1] else None
        return gradient, by_x, back.T @ x, (gradient.T @ inner).mul_(ctx.scaling), None


class _AdaptedLinear(torch.autograd.Function):
    """W x + b + s B A x of x (rows, n), with W (m, n) and b frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        inner = x @ down.T
        ctx.save_for_backward(x, inner, weight, down, up)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(inner, up.T, alpha=scaling)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, down, up = ctx.saved_tensors
        back = (gradient @ up).mul_(ctx.scaling)
        by_x = (gradient @ weight).addmm_(back, down) if ctx.needs_input_grad[0] else None
        return by_x, None, None, back.T @ x, (gradient.T @ inner).mul_(ctx.scaling), None
