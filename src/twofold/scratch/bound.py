"""A bound on how much one step changes the product of two factors, in the spectral norm.

A step ΔA, ΔB of the factors changes the product by ΔA B + A ΔB + ΔA ΔB, which grows with the factors though the step does not.
Spectron (arXiv 2602.12429) finds that training factors is stable if the spectral norm of that change is bounded. Here the bound
is a share of the product's own norm, and a step that goes beyond it is shortened. The change is not computed: by the norms of the
factors it is at most ‖ΔA‖‖B‖ + ‖A‖‖ΔB‖ + ‖ΔA‖‖ΔB‖. In the gauge forms A is [1; T], or B is [1, S].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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

    def __init__(self, layers: Mapping[str, nn.Module], bound: float) -> None:
        self.layers = [layer for layer in layers.values() if isinstance(layer, FactoredLinear)]
        self.bound = bound
        self.shortened = 0

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at each step of an optimizer after it is made."""
        optimizer.register_step_post_hook(self._after)

    def weight_norm(self, state: dict[str, Any], weight: Tensor) -> float:
        """Return ‖A‖₂ of a weight; ``state`` is what the optimizer keeps for it."""
        return spectral_norm(weight)

    def product_norm(self, state: dict[str, Any], layer: FactoredLinear) -> float:
        """Return ‖W′‖₂; ``state`` is what the optimizer keeps for the layer's ``reduce``."""
        return product_norm(layer)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        step_of, state = last_steps(optimizer), optimizer.state
        for layer in self.layers:
            weights = reduce, expand = layer.reduce.weight, layer.expand.weight
            steps = [step_of(weight) for weight in weights]
            down, up = (0.0 if step is None else spectral_norm(step) for step in steps)
            if down == up == 0.0:
                continue
            b, a = self.weight_norm(state[reduce], reduce), self.weight_norm(state[expand], expand)
            if layer.form == "rows":
                a = math.hypot(1.0, a)
            elif layer.form == "columns":
                b = math.hypot(1.0, b)
            change = up * b + a * down + up * down
            most = self.bound * self.product_norm(state[reduce], layer)
            self._shorten(zip(weights, steps, strict=True), change, most)

    def _shorten(self, steps: Iterable[tuple[Tensor, Tensor | None]], change: float, most: float) -> None:
        """Take back so much of the steps of some weights that they change no more than they may."""
        if change > most > 0:
            for weight, step in steps:
                if step is not None:
                    weight.add_(step, alpha=most / change - 1)
            self.shortened += 1


def last_steps(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], Tensor | None]:
    """Return a function from a weight to what AdamW added in its last step, without weight decay; None if it made none."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}

    def step_of(weight: Tensor) -> Tensor | None:
        group, state = groups.get(id(weight)), optimizer.state.get(weight)
        if group is None or not state or "exp_avg" not in state or weight.grad is None:
            return None
        first, second = group["betas"]
        count = float(state["step"])
        scale = math.sqrt(1 - second**count)
        divisor = state["exp_avg_sq"].sqrt().div_(scale).add_(group["eps"])
        step: Tensor = state["exp_avg"].div(divisor).mul_(-(float(group["lr"]) / (1 - first**count)))
        return step

    return step_of


def spectral_norm(matrix: Tensor) -> float:  # of (m, n)
    """Return ‖A‖₂ by subspace iteration from a fixed start, so that a run that is taken up again does the same."""
    return _norm(matrix.shape[1], lambda x: matrix @ x, lambda y: matrix.mT @ y, matrix)


def product_norm(layer: FactoredLinear) -> float:
    """Return ‖W′‖₂ of a factored layer, by its factors; an order of the outputs changes no norm."""
    reduce, expand, rank = layer.reduce.weight, layer.expand.weight, layer.rank
    size = layer.factored_inputs if layer.form == "columns" else reduce.shape[1]

    def forward(x: Tensor) -> Tensor:
        if layer.form == "columns":
            return expand @ (x[:rank] + reduce @ x[rank:])
        inner = reduce @ x
        return torch.cat([inner, expand @ inner]) if layer.form == "rows" else expand @ inner

    def backward(y: Tensor) -> Tensor:
        if layer.form == "rows":
            return reduce.mT @ (y[:rank] + expand.mT @ y[rank:])
        inner = expand.mT @ y
        return torch.cat([inner, reduce.mT @ inner]) if layer.form == "columns" else reduce.mT @ inner

    return _norm(size, forward, backward, reduce)


def _norm(size: int, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Return the largest singular value of a map, by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(size, min(size, WIDTH), generator=generator).to(like.detach())
    for _ in range(ROUNDS):
        image = forward(torch.linalg.qr(block)[0])
        block = backward(image)
    return float(torch.linalg.matrix_norm(image.detach(), 2))
