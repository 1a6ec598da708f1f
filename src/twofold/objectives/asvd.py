"""Activation-aware scaling: C = diag(E|x|^α)², α = 0.5. Source: Yuan et al., 2023 (arXiv 2312.05821)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold import linalg
from twofold.objectives import LayerMoments, Problem, objective
from twofold.objectives._sides import problem_of

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = 0.5


def scaled_columns(weight: Tensor, moments: LayerMoments, damping: float) -> Tensor:  # (n,)
    """Return the damped diagonal of C."""
    assert moments.input_abs is not None
    return linalg.damp(moments.input_abs.to(weight).pow(2 * ALPHA), damping, full=False)


@objective("asvd", source="Yuan et al. 2023 (arXiv 2312.05821)", needs={"input_abs"}, loss="weight")
def asvd(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    return problem_of(weight, scaled_columns(weight, moments, damping), None)
