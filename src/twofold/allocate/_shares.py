"""Choices by a share of each weight, and the largest share that a budget allows."""

from __future__ import annotations

from collections.abc import Callable

from twofold.allocate import Candidate, Choice, cheapest

BISECTIONS = 50


def fit(
    candidates: list[Candidate],
    budget: float,
    choose: Callable[[Candidate, float], Choice],
) -> list[Choice]:
    """The largest share in [0, 1] whose choices keep the budget, found by bisection, and its choices.

    Args:
        choose: the choice for one weight at a share; a larger share must not cost less.
    """

    def at(share: float) -> tuple[list[Choice], float]:
        choices = [choose(candidate, share) for candidate in candidates]
        return choices, sum(choice.cost(c) for choice, c in zip(choices, candidates, strict=True))

    choices, cost = at(1.0)
    if cost <= budget:
        return choices
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if at(middle)[1] > budget:
            high = middle
        else:
            low = middle
    return at(low)[0]


def at_least(candidate: Candidate, rank: float) -> Choice:
    """The smallest allowed rank that is not below ``rank``; dense where that stores no more, or there is no such rank."""
    import numpy as np

    index = int(np.searchsorted(candidate.ranks, rank))
    dense = candidate.dense_cost
    if index >= len(candidate.ranks):
        return Choice(None) if dense is not None else Choice(len(candidate.ranks) - 1)
    if dense is not None and dense <= candidate.costs[index]:
        return Choice(None)
    return Choice(index)


def largest_within(candidate: Candidate, share: float) -> Choice:
    """The largest rank that stores at most a share of the weight; full rank is factored where it stores as much as dense."""
    import numpy as np

    allowed = share * candidate.full_cost * (1 + 1e-9)
    fits = int(np.searchsorted(candidate.costs, allowed, side="right")) - 1
    dense = candidate.dense_cost
    if dense is not None and dense <= allowed and (fits < 0 or candidate.costs[fits] < dense):
        return Choice(None)
    return Choice(fits) if fits >= 0 else cheapest(candidate)
