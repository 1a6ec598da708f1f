"""The two sides of an objective from the moments that there are: C or W C Wᵀ, and G or Wᵀ G W."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from twofold import linalg
from twofold.objectives import LayerMoments, Problem, Side

if TYPE_CHECKING:
    from torch import Tensor


def problem_of(
    weight: Tensor,  # (m, n)
    inputs: Tensor | None,  # their metric: None, (n,), or what ``input_side`` gives
    outputs: Tensor | None,  # their metric: None, (m,), or what ``gradient_side`` gives
    full: Collection[str] = (),  # of "input" and "gradient", those that ``input_side`` and ``gradient_side`` gave
) -> Problem:
    """Return the problem of two metrics; of a full one over the larger side there is the weight's Gram matrix already."""
    side = linalg.smaller_side(*weight.shape)
    near, far, larger = (outputs, inputs, "input") if side == "rows" else (inputs, outputs, "gradient")
    return Problem(near, far if far is not None and larger in full else linalg.gram(weight, far), side)


def diagonal(weight: Tensor, moment: Tensor | None, damping: float) -> Tensor:
    """Return the damped diagonal metric of a moment that is a vector."""
    assert moment is not None
    return linalg.damp(moment.to(weight), damping, full=False)


def input_side(weight: Tensor, moments: LayerMoments, damping: float) -> Tensor:
    """Return the damped C where it is the metric (m > n), else the damped W C Wᵀ.

    Damping C by δ·mean(diag C) adds δ·mean(diag C)·W Wᵀ to W C Wᵀ, so the two ways to measure agree.
    """
    return _side("columns", weight, moments.input, moments.output, damping, moments.input_trace)


def gradient_side(weight: Tensor, moments: LayerMoments, damping: float) -> Tensor:
    """Return the damped G where it is the metric (m ≤ n), else the damped Wᵀ G W."""
    return _side("rows", weight, moments.gradient, moments.input_gradient, damping, moments.gradient_trace)


def _side(
    side: Side, weight: Tensor, moment: Tensor | None, product: Tensor | None, damping: float, trace: float
) -> Tensor:
    if moment is not None:
        damped = linalg.damp(moment.to(weight), damping)
        return damped if linalg.smaller_side(*weight.shape) == side else linalg.gram(weight, damped)
    assert product is not None
    wide = weight if side == "columns" else weight.T
    added = damping * trace / wide.shape[1]
    if added == 0.0 and not product.any():
        added = 1.0  # nothing was measured: every direction weighs the same, as damp() does
    return product.to(weight) + added * (wide @ wide.T)
