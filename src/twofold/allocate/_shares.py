"""Choices by a share of each weight, and the largest share that a budget allows."""

from __future__ import annotations

from collections.abc import Callable

from twofold.allocate import Candidate, Choice, cheapest, total_cost

BISECTIONS = 50


def fit(candidates: list[Candidate], budget: float, choose: Callable[[Candidate, float], Choice]) -> list[Choice]:
    """Return the choices at the largest share in [0, 1] that keeps the budget, found by bisection.

    Args:
        choose: the choice for one weight at a share; a larger share must not cost less.
    """

    def at(share: float) -> list[Choice]:
        return [choose(candidate, share) for candidate in candidates]

    if total_cost(candidates, choices := at(1.0)) <= budget:
        return choices
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if total_cost(candidates, at(middle)) > budget:
            high = middle
        else:
            low = middle
    return at(low)


def at_least(candidate: Candidate, rank: float) -> Choice:
    """Choose the smallest rank not below ``rank``; dense where that stores no more, or there is no such rank."""
    import numpy as np

    index = int(np.searchsorted(candidate.ranks, rank))
    dense = candidate.dense_cost
    if index >= len(candidate.ranks):
        return Choice(None) if dense is not None else Choice(len(candidate.ranks) - 1)
    return Choice(None) if dense is not None and dense <= candidate.costs[index] else Choice(index)


def largest_within(candidate: Candidate, share: float) -> Choice:
    """Choose the largest rank that stores at most a share of the weight; full rank is factored, though dense stores as much."""
    import numpy as np

    allowed = share * candidate.full_cost * (1 + 1e-9)
    index = int(np.searchsorted(candidate.costs, allowed, side="right")) - 1
    dense = candidate.dense_cost
    if dense is not None and dense <= allowed and (index < 0 or candidate.costs[index] < dense):
        return Choice(None)
    return Choice(index) if index >= 0 else cheapest(candidate)
