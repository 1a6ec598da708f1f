"""The statistics of what passes a weight, each a sum that is fed rows: what it is fed, its shape, and what a row adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

Add: TypeAlias = Callable[[Tensor, Tensor], object]  # (the sum, rows), in place
Feed: TypeAlias = Literal["inputs", "outputs", "gradients", "input_gradients"]


@dataclass(frozen=True)
class Statistic:
    """A sum over rows (rows, k): a matrix (k, k), a vector (k,) or a number."""

    feed: Feed
    shape: Literal["matrix", "vector", "number"]
    add: Add

    def size(self, k: int) -> tuple[int, ...]:
        """Return the shape of the sum."""
        return {"matrix": (k, k), "vector": (k,), "number": ()}[self.shape]


def _products(total: Tensor, rows: Tensor) -> None:
    total.addmm_(rows.T, rows)


def _count(total: Tensor, rows: Tensor) -> None:
    total += len(rows)


def _trace(total: Tensor, rows: Tensor) -> None:
    total += rows.square().sum()


def _squares(total: Tensor, rows: Tensor) -> None:
    total += rows.square().sum(0)


STATISTICS = {
    "rows": Statistic("inputs", "number", _count),
    "input": Statistic("inputs", "matrix", _products),
    "input_mean": Statistic("inputs", "vector", lambda total, rows: total.add_(rows.sum(0))),
    "input_abs": Statistic("inputs", "vector", lambda total, rows: total.add_(rows.abs().sum(0))),
    "input_square": Statistic("inputs", "vector", _squares),
    "input_trace": Statistic("inputs", "number", _trace),
    "output": Statistic("outputs", "matrix", _products),
    "gradient": Statistic("gradients", "matrix", _products),
    "gradient_trace": Statistic("gradients", "number", _trace),
    "gradient_square": Statistic("gradients", "vector", _squares),
    "input_gradient": Statistic("input_gradients", "matrix", _products),
}
PAIRED = "fisher_rows"  # Σ_j (g_i x_j)², of the gradients of a call and the squared norms of its inputs
BACKWARD = (*(name for name, one in STATISTICS.items() if "gradient" in one.feed), PAIRED)
FORWARD = tuple(name for name in STATISTICS if name not in BACKWARD)


def is_square(kind: str) -> bool:
    """Say whether a kind of moments is a matrix (k, k)."""
    return kind in STATISTICS and STATISTICS[kind].shape == "matrix"


def size_of(kind: str, k: int) -> tuple[int, ...]:
    """Return the shape of a moment over k directions."""
    return (k,) if kind == PAIRED else STATISTICS[kind].size(k)
