"""Plain truncation: min ‖W − W′‖_F. Needs no data; a baseline. Source: Eckart & Young, 1936."""

from torch import Tensor

from twofold.linalg.spectrum import gram, smaller_side
from twofold.objectives.base import LayerMoments, Problem, objective


@objective("svd", source="Eckart & Young 1936", needs=set(), loss="weight")
def svd(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    return Problem(None, gram(weight, None), smaller_side(*weight.shape))
