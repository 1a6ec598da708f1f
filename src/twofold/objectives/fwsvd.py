"""Fisher-weighted rows: G = diag(Σ_j F_ij), F the Fisher information of each weight. Source: Hsu et al., ICLR 2022.

Here F is summed token by token with labels sampled from the model; the paper takes it from a task's own labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold import linalg
from twofold.objectives import LayerMoments, Problem, objective

if TYPE_CHECKING:
    from torch import Tensor


def fisher_rows(weight: Tensor, moments: LayerMoments, damping: float) -> Tensor:  # (m,)
    """The damped diagonal of G."""
    assert moments.fisher_rows is not None
    return linalg.damp(moments.fisher_rows.to(weight), damping, full=False)


@objective("fwsvd", source="Hsu et al., ICLR 2022 (arXiv 2207.00112)", needs={"fisher_rows"}, loss="weight")
def fwsvd(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    rows = fisher_rows(weight, moments, damping)
    if linalg.smaller_side(*weight.shape) == "rows":
        return Problem(rows, linalg.gram(weight, None), "rows")
    return Problem(None, linalg.gram(weight, rows), "columns")
