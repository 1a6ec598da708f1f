"""Ranks in proportion to the effective rank of each weight, the exponential of the entropy of σ² / Σ σ² (Roy & Vetterli 2007).

Swift-SVD (Qi, ICML 2026) shares out ranks by it, normalized by the full rank, times an importance of each layer. Here alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold.allocate import Candidate, Choice, allocation
from twofold.allocate._shares import at_least, fit

if TYPE_CHECKING:
    import numpy as np


@allocation("effective-rank")
def effective_rank(candidates: list[Candidate], budget: float) -> list[Choice]:
    sizes = {candidate.name: entropy_rank(candidate.values) for candidate in candidates}
    # At this factor every weight has its full rank.
    most = max(len(c.values) / sizes[c.name] for c in candidates if c.values is not None)
    return fit(candidates, budget, lambda c, share: at_least(c, round(share * most * sizes[c.name])))


def entropy_rank(values: np.ndarray | None) -> float:  # σ² (k,)
    """Return exp of the entropy of the values as shares of their sum, between 1 and k; 1 if all are zero."""
    import numpy as np

    assert values is not None
    total = values.sum()
    if total <= 0:
        return 1.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
