"""Activation-aware scaling: C = diag(E|x|^α)², α = 0.5. Source: Yuan et al., 2023 (arXiv 2312.05821)."""

from torch import Tensor

from twofold.linalg import damp, gram, smaller_side
from twofold.objectives.base import LayerMoments, Problem, objective

ALPHA = 0.5


@objective("asvd", source="Yuan et al. 2023 (arXiv 2312.05821)", needs={"input_abs"}, loss="weight")
def asvd(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    assert moments.input_abs is not None
    columns = damp(moments.input_abs.to(weight).pow(2 * ALPHA), damping, full=False)  # (n,)
    if smaller_side(*weight.shape) == "rows":
        return Problem(None, gram(weight, columns), "rows")
    return Problem(columns, gram(weight, None), "columns")
