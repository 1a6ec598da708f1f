"""Either side of an objective from the moments that there are: C or W C Wᵀ, and G or Wᵀ G W."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold import linalg
from twofold.objectives import LayerMoments

if TYPE_CHECKING:
    from torch import Tensor


def input_side(weight: Tensor, moments: LayerMoments, damping: float) -> Tensor:
    """The damped C where it is the metric (m > n), else the damped W C Wᵀ.

    Damping C by δ·mean(diag C) adds δ·mean(diag C)·W Wᵀ to W C Wᵀ, so the two ways to measure agree.
    """
    m, n = weight.shape
    if linalg.smaller_side(m, n) == "columns":
        assert moments.input is not None
        return linalg.damp(moments.input.to(weight), damping)
    if moments.input is not None:
        return linalg.gram(weight, linalg.damp(moments.input.to(weight), damping))
    assert moments.output is not None
    return _damped_product(weight, moments.output.to(weight), damping * moments.input_trace / n)


def gradient_side(weight: Tensor, moments: LayerMoments, damping: float) -> Tensor:
    """The damped G where it is the metric (m ≤ n), else the damped Wᵀ G W."""
    m, n = weight.shape
    if linalg.smaller_side(m, n) == "rows":
        assert moments.gradient is not None
        return linalg.damp(moments.gradient.to(weight), damping)
    if moments.gradient is not None:
        return linalg.gram(weight, linalg.damp(moments.gradient.to(weight), damping))
    assert moments.input_gradient is not None
    return _damped_product(weight.T, moments.input_gradient.to(weight), damping * moments.gradient_trace / m)


def _damped_product(wide: Tensor, moment: Tensor, added: float) -> Tensor:
    if added == 0.0 and not moment.any():
        added = 1.0  # nothing was measured: every direction weighs the same, as damp() does
    return moment + added * (wide @ wide.T)
