"""Fisher-weighted rows: G = diag(Σ_j F_ij), F the Fisher information of each weight. Source: Hsu et al., ICLR 2022.

Here F is summed token by token with labels sampled from the model; the paper takes it from a task's own labels.
"""

from torch import Tensor

from twofold.linalg.metric import damp
from twofold.linalg.spectrum import gram, smaller_side
from twofold.objectives.base import LayerMoments, Problem, objective


def fisher_rows(weight: Tensor, moments: LayerMoments, damping: float) -> Tensor:  # (m,)
    """The damped diagonal of G."""
    assert moments.fisher_rows is not None
    return damp(moments.fisher_rows.to(weight), damping, full=False)


@objective("fwsvd", source="Hsu et al., ICLR 2022 (arXiv 2207.00112)", needs={"fisher_rows"}, loss="weight")
def fwsvd(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    rows = fisher_rows(weight, moments, damping)
    if smaller_side(*weight.shape) == "rows":
        return Problem(rows, gram(weight, None), "rows")
    return Problem(None, gram(weight, rows), "columns")
