"""One share for all weights: each gets the largest rank whose storage fits in that share of its own.

The share is the budget over the size of all of them; where smallest ranks, multiples or dense weights would then store more
than the budget, the largest share that keeps it.
"""

from twofold.allocate import Candidate, Choice, allocation
from twofold.allocate._shares import fit, largest_within


@allocation("uniform", takes={"ranks", "structures"}, blind=True)
def uniform(candidates: list[Candidate], budget: float) -> list[Choice]:
    most = budget / sum(candidate.full_cost for candidate in candidates)
    return fit(candidates, budget, lambda candidate, share: largest_within(candidate, share * most))
