"""The same share of every weight: each gets the largest rank whose storage fits in budget / (all of them) of its own."""

import numpy as np

from twofold.allocate.base import Candidate, Choice, allocation, cheapest


@allocation("uniform")
def uniform(candidates: list[Candidate], budget: float) -> list[Choice]:
    share = budget / sum(candidate.full_cost for candidate in candidates)
    choices = []
    for candidate in candidates:
        allowed = share * candidate.full_cost * (1 + 1e-9)
        fits = int(np.searchsorted(candidate.costs, allowed, side="right")) - 1
        dense = candidate.dense_cost
        if dense is not None and dense <= allowed and (fits < 0 or candidate.costs[fits] < dense):
            choices.append(Choice(None))  # it fits, and no rank keeps as much; full rank does, and is factored
        elif fits >= 0:
            choices.append(Choice(fits))
        else:
            choices.append(cheapest(candidate))
    return choices
