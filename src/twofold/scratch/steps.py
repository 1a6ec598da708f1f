"""What keeps the steps of factors in bounds: their rates scaled by norms, or the steps shortened; the norms are followed.

Both rules look at the moment's spectral norms, as Spectron does (arXiv 2602.12429). A weight changes little from one step to the
next, so one round of power iteration a step follows its norm. The direction is kept in the optimizer's state of the weight, so
that a training that is taken up again does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from twofold.nn.layers.factored import FactoredLinear
from twofold.scratch.bound import BoundedUpdate, last_steps, spectral_norm

DIRECTION = "twofold_direction_"  # in the optimizer's state of a weight: of the weight, or its product
FIRST_ROUNDS = 30  # of power iteration
TINY = 1e-12


@dataclass
class ScaledSteps:
    """Multiplies the rate of every factor for the time of a step; a scheduler sees the rates as they were set."""

    layers: list[FactoredLinear]
    _rates: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    _directions: list[tuple[Tensor, Tensor]] = field(default_factory=list)

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
            m, n, r = layer.out_features, layer.in_features, layer.rank
            # For the steps of B (r, n) and of A (m, r): ½√(m/r) / ‖A‖₂ and ½√(n/r) / ‖B‖₂.
            shares = 0.5 * math.sqrt(m / r) / max(a, TINY), 0.5 * math.sqrt(n / r) / max(b, TINY)
            for weight, share in zip((reduce, expand), shares, strict=True):
                group = groups[id(weight)]
                self._rates.append((group, group["lr"]))
                group["lr"] = group["lr"] * share

    def _norm(self, optimizer: torch.optim.Optimizer, weight: Tensor) -> float:
        norm, direction = matrix_norm(weight, _known(optimizer, weight, "weight"))
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


def _known(optimizer: torch.optim.Optimizer, weight: Tensor, what: str) -> Tensor | None:
    """Return the direction that the optimizer's state of a weight holds, if it has any; its state is not begun here."""
    return optimizer.state[weight].get(f"{DIRECTION}{what}") if weight in optimizer.state else None


class BoundedSteps(BoundedUpdate):
    """Shortens the steps that change a product, or a dense weight, by more than a share of its own norm."""

    def __init__(self, layers: Mapping[str, nn.Module], dense: list[Tensor], bound: float) -> None:
        super().__init__(layers, bound)
        self.dense = dense
        self._norms: dict[tuple[int, str], tuple[float, Tensor]] = {}  # before the step

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._before)
        super().attach(optimizer)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        pairs = [(layer.expand.weight, layer.reduce.weight) for layer in self.layers]
        for a, b in pairs:
            self._norms[id(b), "product"] = factors_norm(a, b, _known(optimizer, b, "product"))
        for weight in [*chain(*pairs), *self.dense]:
            self._norms[id(weight), "weight"] = matrix_norm(weight, _known(optimizer, weight, "weight"))

    def _norm(self, state: dict[str, Any], weight: Tensor, what: str) -> float:
        value, direction = self._norms[id(weight), what]
        if state:  # AdamW begins a state of its own in an empty one
            state[f"{DIRECTION}{what}"] = direction
        return value

    def weight_norm(self, state: dict[str, Any], weight: Tensor) -> float:
        return self._norm(state, weight, "weight")

    def product_norm(self, state: dict[str, Any], layer: FactoredLinear) -> float:
        return self._norm(state, layer.reduce.weight, "product")

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        super()._after(optimizer, args, kwargs)
        step_of = last_steps(optimizer)
        for weight in self.dense:
            step = step_of(weight)
            if step is not None:
                most = self.bound * self.weight_norm(optimizer.state[weight], weight)
                self._shorten([(weight, step)], spectral_norm(step), most)


def matrix_norm(matrix: Tensor, direction: Tensor | None) -> tuple[float, Tensor]:  # of (m, n), from (n,)
    """Return ‖W‖₂ by ``power_iteration``, and the direction to go on from."""
    return power_iteration(lambda x: matrix @ x, lambda y: matrix.mT @ y, matrix[0], direction)


def factors_norm(
    left: Tensor, right: Tensor, direction: Tensor | None
) -> tuple[float, Tensor]:  # of (m, r) and (r, n), from (n,)
    """Return ‖AB‖₂ by ``power_iteration``, and the direction to go on from."""
    return power_iteration(lambda x: left @ (right @ x), lambda y: right.mT @ (left.mT @ y), right[0], direction)


@torch.no_grad()
def power_iteration(
    forward: Callable[[Tensor], Tensor],  # (n,) → (m,)
    backward: Callable[[Tensor], Tensor],  # (m,) → (n,), its transpose
    like: Tensor,  # (n,)
    direction: Tensor | None,  # (n,), of the last call
) -> tuple[float, Tensor]:
    """Return the spectral norm of a map, from below, and the direction to go on from; the first call takes many rounds."""
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
