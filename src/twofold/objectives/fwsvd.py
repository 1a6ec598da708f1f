"""Fisher-weighted rows: G = diag(Σ_j F_ij), F the Fisher information of each weight. Source: Hsu et al., ICLR 2022.

Here F is summed token by token with labels sampled from the model; the paper takes it from a task's own labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold.objectives import LayerMoments, Problem, objective
from twofold.objectives._sides import diagonal, problem_of

if TYPE_CHECKING:
    from torch import Tensor


@objective("fwsvd", source="Hsu et al., ICLR 2022 (arXiv 2207.00112)", needs={"fisher_rows"}, loss="weight")
def fwsvd(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    return problem_of(weight, None, diagonal(weight, moments.fisher_rows, damping))
