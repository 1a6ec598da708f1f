"""The same share of every weight: each gets the largest rank whose storage fits in that share of its own.

The share is the budget over the size of all of them; where smallest ranks, multiples or dense weights would then store more
than the budget, the largest share that keeps it.
"""

import numpy as np

from twofold.allocate.base import Candidate, Choice, allocation, cheapest, fit


@allocation("uniform")
def uniform(candidates: list[Candidate], budget: float) -> list[Choice]:
    most = budget / sum(candidate.full_cost for candidate in candidates)
    return fit(candidates, budget, lambda candidate, share: _largest_within(candidate, share * most))


def _largest_within(candidate: Candidate, share: float) -> Choice:
    """The largest rank that stores at most a share of the weight; full rank is factored where it stores as much as dense."""
    allowed = share * candidate.full_cost * (1 + 1e-9)
    fits = int(np.searchsorted(candidate.costs, allowed, side="right")) - 1
    dense = candidate.dense_cost
    if dense is not None and dense <= allowed and (fits < 0 or candidate.costs[fits] < dense):
        return Choice(None)
    return Choice(fits) if fits >= 0 else cheapest(candidate)
