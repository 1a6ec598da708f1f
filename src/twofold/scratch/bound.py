"""A bound on how much one step changes the product of two factors, in the spectral norm.

A step ΔA, ΔB of the factors changes the product by ΔA B + A ΔB + ΔA ΔB, which grows with the factors though the step does not.
Spectron (arXiv 2602.12429) finds that training factors is stable if the spectral norm of that change is bounded. Here the bound
is a share of the product's own norm, and a step that goes beyond it is shortened. The change is not computed: by the norms of the
factors it is at most ‖ΔA‖‖B‖ + ‖A‖‖ΔB‖ + ‖ΔA‖‖ΔB‖. In the gauge forms A is [1; T], or B is [1, S].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from twofold.nn.layers.factored import FactoredLinear

ROUNDS, WIDTH = 4, 4  # of subspace iteration, and its directions; the norm is then right to some percent


class BoundedUpdate:
    """Shortens the steps of AdamW that change a product too much.

    The step is read from AdamW's own state (−rate · m̂ / (√v̂ + ε)), so that no copy of the factors is kept. Weight decay, which is
    a step towards zero, is left as it is.
    """

    def __init__(self, layers: dict[str, nn.Module], bound: float) -> None:
        self.layers = {name: layer for name, layer in layers.items() if isinstance(layer, FactoredLinear)}
        self.bound = bound
        self.shortened = 0

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at each step of an optimizer after it is made."""
        optimizer.register_step_post_hook(self._after)

    def norm(self, state: dict[str, Any], what: str, matrix: Tensor) -> float:
        """‖·‖₂ of a weight or of its step; ``state`` is what the optimizer keeps for that weight."""
        return spectral_norm(matrix)

    def product_norm(self, state: dict[str, Any], layer: FactoredLinear) -> float:
        """‖W′‖₂; ``state`` is what the optimizer keeps for the layer's ``reduce``."""
        return product_norm(layer)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for layer in self.layers.values():
            reduce, expand = layer.reduce.weight, layer.expand.weight
            steps = [last_step(optimizer, groups.get(id(weight)), weight) for weight in (reduce, expand)]
            state = optimizer.state
            down, up = (
                self.norm(state[weight], "step", step) if step is not None else 0.0
                for weight, step in zip((reduce, expand), steps, strict=True)
            )
            if down == up == 0.0:
                continue
            b, a = (self.norm(state[weight], "weight", weight) for weight in (reduce, expand))
            if layer.form == "rows":
                a = math.hypot(1.0, a)
            elif layer.form == "columns":
                b = math.hypot(1.0, b)
            change = up * b + a * down + up * down
            most = self.bound * self.product_norm(state[reduce], layer)
            if change > most > 0:
                share = most / change
                for weight, step in zip((reduce, expand), steps, strict=True):
                    if step is not None:
                        weight.add_(step, alpha=share - 1)
                self.shortened += 1


def last_step(optimizer: torch.optim.Optimizer, group: dict[str, Any] | None, weight: Tensor) -> Tensor | None:
    """What AdamW added to a weight in the step that it made last, without weight decay; None if it made none."""
    state = optimizer.state.get(weight)
    if group is None or not state or "exp_avg" not in state or weight.grad is None:
        return None
    first, second = group["betas"]
    count = float(state["step"])
    scale = math.sqrt(1 - second**count)
    divisor = state["exp_avg_sq"].sqrt().div_(scale).add_(group["eps"])
    rate = float(group["lr"]) / (1 - first**count)
    step: Tensor = state["exp_avg"].div(divisor).mul_(-rate)
    return step


def spectral_norm(
    matrix: Tensor,  # (m, n)
) -> float:
    """‖A‖₂ by subspace iteration from a fixed start, so that a run that is taken up again does the same."""
    return _norm(matrix.shape[1], lambda x: matrix @ x, lambda y: matrix.mT @ y, matrix)


def product_norm(layer: FactoredLinear) -> float:
    """‖W′‖₂ of a factored layer, by its factors."""
    reduce, expand, order = layer.reduce.weight, layer.expand.weight, layer.order
    rank = layer.rank
    if order is None:
        return _norm(reduce.shape[1], lambda x: expand @ (reduce @ x), lambda y: reduce.mT @ (expand.mT @ y), reduce)
    if layer.form == "rows":  # an order of the outputs changes no norm
        return _norm(
            reduce.shape[1],
            lambda x: (lambda z: torch.cat([z, expand @ z]))(reduce @ x),
            lambda y: reduce.mT @ (y[:rank] + expand.mT @ y[rank:]),
            reduce,
        )
    return _norm(
        layer.factored_inputs,
        lambda x: expand @ (x[:rank] + reduce @ x[rank:]),
        lambda y: (lambda z: torch.cat([z, reduce.mT @ z]))(expand.mT @ y),
        reduce,
    )


def _norm(size: int, forward: Any, backward: Any, like: Tensor) -> float:
    """The largest singular value of a map, by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(size, min(size, WIDTH), generator=generator).to(like.detach())
    for _ in range(ROUNDS):
        image = forward(torch.linalg.qr(block)[0])
        block = backward(image)
    return float(torch.linalg.matrix_norm(image.detach(), 2))
