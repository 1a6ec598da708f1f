"""The statistics of what passes a weight, each a sum that is fed rows: what it is fed, its shape, and what a row adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

Add: TypeAlias = Callable[[Tensor, Tensor], object]  # (the sum, rows), in place
Feed: TypeAlias = Literal["inputs", "outputs", "gradients", "input_gradients", "pairs"]


@dataclass(frozen=True)
class RunningSum:
    """A sum over rows (rows, k): a matrix (k, k), a vector (k,) or a number."""

    feed: Feed
    shape: Literal["matrix", "vector", "number"]
    add: Add


def rows_of(x: Tensor) -> Tensor:  # (..., k) to (rows, k)
    """Return what passes a weight as rows, without their graph."""
    return x.detach().reshape(-1, x.shape[-1])


def _products(total: Tensor, rows: Tensor) -> None:
    total.addmm_(rows.T, rows)


def _trace(total: Tensor, rows: Tensor) -> None:
    total += rows.square().sum()


def _rows(total: Tensor, rows: Tensor) -> None:
    total += rows.sum(0)


def _squares(total: Tensor, rows: Tensor) -> None:
    total += rows.square().sum(0)


STATISTICS = {
    "rows": RunningSum("inputs", "number", lambda total, rows: total.add_(len(rows))),
    "input": RunningSum("inputs", "matrix", _products),
    "input_mean": RunningSum("inputs", "vector", _rows),
    "input_abs": RunningSum("inputs", "vector", lambda total, rows: total.add_(rows.abs().sum(0))),
    "input_square": RunningSum("inputs", "vector", _squares),
    "input_trace": RunningSum("inputs", "number", _trace),
    "output": RunningSum("outputs", "matrix", _products),
    "output_mean": RunningSum("outputs", "vector", _rows),
    "gradient": RunningSum("gradients", "matrix", _products),
    "gradient_trace": RunningSum("gradients", "number", _trace),
    "gradient_square": RunningSum("gradients", "vector", _squares),
    "input_gradient": RunningSum("input_gradients", "matrix", _products),
    # Σ_j (g_i x_j)²: fed, for each call, the squared gradients weighed by the squared norms of the inputs.
    "fisher_rows": RunningSum("pairs", "vector", lambda total, squares: total.add_(squares)),
}
FORWARD = tuple(name for name, statistic in STATISTICS.items() if statistic.feed in ("inputs", "outputs"))
BACKWARD = tuple(name for name in STATISTICS if name not in FORWARD)


def size_of(kind: str, k: int) -> tuple[int, ...]:
    """Return the shape of a moment over k directions."""
    return {"matrix": (k, k), "vector": (k,), "number": ()}[STATISTICS[kind].shape]
