"""Plain truncation: min ‖W − W′‖_F. Needs no data; a baseline. Source: Eckart & Young, 1936."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold import linalg
from twofold.objectives import LayerMoments, Problem, objective

if TYPE_CHECKING:
    from torch import Tensor


@objective("svd", source="Eckart & Young 1936", needs=set(), loss="weight", full=set())
def svd(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    return Problem(None, linalg.gram(weight, None), linalg.smaller_side(*weight.shape))
