"""What keeps the steps of factors in bounds: their rates scaled by norms, or the steps shortened; the norms are followed.

Both rules look at the moment's spectral norms, as Spectron does (arXiv 2602.12429). A weight changes little from one step to the
next, so one round of power iteration a step follows its norm. The direction is kept in the optimizer's state of the weight, so
that a training that is taken up again does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twofold.nn.layers.factored import FactoredLinear
from twofold.scratch.bound import BoundedUpdate, last_step, spectral_norm

DIRECTION = "twofold_direction_"  # in the optimizer's state of a weight: of the weight, or its product
FIRST_ROUNDS = 30  # of power iteration
TINY = 1e-12


class ScaledSteps:
    """Multiplies the rate of every factor for the time of a step; a scheduler sees the rates as they were set."""

    def __init__(self, layers: list[FactoredLinear]) -> None:
        self.layers = layers
        self._rates: list[tuple[dict[str, Any], float]] = []
        self._directions: list[tuple[Tensor, Tensor]] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the rates of an optimizer in whose groups every factor stands alone."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = {id(group["params"][0]): group for group in optimizer.param_groups if len(group["params"]) == 1}
        for layer in self.layers:
            reduce, expand = layer.reduce.weight, layer.expand.weight
            b, a = (self._norm(optimizer, weight) for weight in (reduce, expand))
            shares = step_scales(layer, a, b)
            for weight, share in zip((reduce, expand), shares, strict=True):
                group = groups[id(weight)]
                self._rates.append((group, group["lr"]))
                group["lr"] = group["lr"] * share

    def _norm(self, optimizer: torch.optim.Optimizer, weight: Tensor) -> float:
        known = optimizer.state[weight].get(f"{DIRECTION}weight") if weight in optimizer.state else None
        norm, direction = matrix_norm(weight, known)
        self._directions.append((weight, direction))
        return norm

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        for weight, direction in self._directions:
            if optimizer.state.get(weight):  # AdamW begins a state of its own in an empty one
                optimizer.state[weight][f"{DIRECTION}weight"] = direction
        self._rates.clear()
        self._directions.clear()


def step_scales(layer: FactoredLinear, expand_norm: float, reduce_norm: float) -> tuple[float, float]:
    """By what the rates of ``reduce`` (r, n) and ``expand`` (m, r) are multiplied: ½√(m/r) / ‖A‖₂ and ½√(n/r) / ‖B‖₂."""
    m, n, r = layer.out_features, layer.in_features, layer.rank
    return 0.5 * math.sqrt(m / r) / max(expand_norm, TINY), 0.5 * math.sqrt(n / r) / max(reduce_norm, TINY)


class BoundedSteps(BoundedUpdate):
    """Shortens the steps that change a product, or a dense weight, by more than a share of its own norm."""

    def __init__(self, layers: dict[str, Any], dense: list[Tensor], bound: float) -> None:
        super().__init__(layers, bound)
        self.dense = dense
        self._norms: dict[tuple[int, str], tuple[float, Tensor]] = {}  # of before the step

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._before)
        super().attach(optimizer)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        def known(weight: Tensor, what: str) -> Tensor | None:
            return optimizer.state[weight].get(f"{DIRECTION}{what}") if weight in optimizer.state else None

        pairs = [(layer.expand.weight, layer.reduce.weight) for layer in self.layers.values()]
        for a, b in pairs:
            self._norms[id(b), "product"] = factors_norm(a, b, known(b, "product"))
        for weight in [weight for pair in pairs for weight in pair] + self.dense:
            self._norms[id(weight), "weight"] = matrix_norm(weight, known(weight, "weight"))

    def norm(self, state: dict[str, Any], what: str, matrix: Tensor) -> float:
        if what == "step":  # it may be another one than the last, so nothing is followed
            return spectral_norm(matrix)
        value, direction = self._norms[id(matrix), "weight"]
        if state:  # AdamW begins a state of its own in an empty one
            state[f"{DIRECTION}weight"] = direction
        return value

    def product_norm(self, state: dict[str, Any], layer: FactoredLinear) -> float:
        value, direction = self._norms[id(layer.reduce.weight), "product"]
        if state:
            state[f"{DIRECTION}product"] = direction
        return value

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        super()._after(optimizer, args, kwargs)
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for weight in self.dense:
            step = last_step(optimizer, groups.get(id(weight)), weight)
            if step is None:
                continue
            state = optimizer.state[weight]
            change, most = self.norm(state, "step", step), self.bound * self.norm(state, "weight", weight)
            if change > most > 0:
                weight.add_(step, alpha=most / change - 1)
                self.shortened += 1


def matrix_norm(
    matrix: Tensor,  # (m, n)
    direction: Tensor | None,  # (n,)
) -> tuple[float, Tensor]:
    """‖W‖₂ by ``power_iteration``."""
    return power_iteration(lambda x: matrix @ x, lambda y: matrix.mT @ y, matrix[0], direction)


def factors_norm(
    left: Tensor,  # (m, r)
    right: Tensor,  # (r, n)
    direction: Tensor | None,  # (n,)
) -> tuple[float, Tensor]:
    """‖AB‖₂ by ``power_iteration``."""
    return power_iteration(lambda x: left @ (right @ x), lambda y: right.mT @ (left.mT @ y), right[0], direction)


@torch.no_grad()
def power_iteration(
    forward: Callable[[Tensor], Tensor],  # (n,) → (m,)
    backward: Callable[[Tensor], Tensor],  # (m,) → (n,), its transpose
    like: Tensor,  # (n,)
    direction: Tensor | None,  # (n,), of the last call
) -> tuple[float, Tensor]:
    """The spectral norm of a map, from below, and the direction to go on from; without one, many rounds from a fixed start."""
    rounds = 1
    if direction is None:
        rounds = FIRST_ROUNDS
        direction = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
        direction = direction / direction.norm()
    image = forward(direction)
    for _ in range(rounds):
        back = backward(image)
        size = back.norm()
        if not float(size) > 0:  # a map to nothing
            return 0.0, direction
        direction = back / size
        image = forward(direction)
    return float(image.norm()), direction
