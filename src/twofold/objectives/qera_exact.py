"""The correction with the least error of the outputs: min ‖(E − A B) C^½‖_F. Source: Zhang et al. 2024 (arXiv 2410.06040)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold import linalg
from twofold.objectives import LayerMoments, corrective_objective
from twofold.objectives._correction import Correction

if TYPE_CHECKING:
    from torch import Tensor


@corrective_objective(
    "qera-exact", source="Zhang et al. 2024 (arXiv 2410.06040)", needs={"whole_input"}, settings=Correction
)
def qera_exact(error: Tensor, moments: LayerMoments, damping: float, rank: int) -> tuple[Tensor, Tensor]:
    assert moments.input is not None
    return linalg.weighted_low_rank(error, rank, None, linalg.damp(moments.input.to(error), damping))
