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
        if fits >= 0:
            choices.append(Choice(fits))
        elif candidate.dense_cost is not None and candidate.dense_cost <= allowed:
            choices.append(Choice(None))
        else:
            choices.append(cheapest(candidate))
    return choices
