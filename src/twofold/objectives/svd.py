"""Plain truncation: min ‖W − W′‖_F. Needs no data; a baseline. Source: Eckart & Young, 1936."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold.objectives import LayerMoments, Problem, objective
from twofold.objectives._sides import problem_of

if TYPE_CHECKING:
    from torch import Tensor


@objective("svd", source="Eckart & Young 1936", needs=set(), loss="weight", full=set())
def svd(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    return problem_of(weight, None, None)
