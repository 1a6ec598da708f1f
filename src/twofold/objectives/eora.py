"""The correction that is an SVD of E Q Λ^½, C = Q Λ Qᵀ, taken back by the inverse. Source: Liu et al. 2024 (arXiv 2410.21271)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold import linalg
from twofold.objectives import LayerMoments, corrective_objective
from twofold.objectives._correction import Correction

if TYPE_CHECKING:
    from torch import Tensor


@corrective_objective("eora", source="Liu et al. 2024 (arXiv 2410.21271)", needs={"whole_input"}, settings=Correction)
def eora(error: Tensor, moments: LayerMoments, damping: float, rank: int) -> tuple[Tensor, Tensor]:
    assert moments.input is not None
    return linalg.eigen_low_rank(error, rank, linalg.damp(moments.input.to(error), damping))
