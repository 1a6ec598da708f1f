"""The correction that is an SVD of E S, S the mean magnitudes of the inputs. Source: Zhang et al. 2024 (arXiv 2402.02446)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold import linalg
from twofold.objectives import LayerMoments, corrective_objective
from twofold.objectives._correction import Correction

if TYPE_CHECKING:
    from torch import Tensor


@corrective_objective("lqer", source="Zhang et al. 2024 (arXiv 2402.02446)", needs={"input_abs"}, settings=Correction)
def lqer(error: Tensor, moments: LayerMoments, damping: float, rank: int) -> tuple[Tensor, Tensor]:
    assert moments.input_abs is not None
    scales = linalg.damp(moments.input_abs.to(error).square(), damping, full=False)
    return linalg.weighted_low_rank(error, rank, None, scales)
