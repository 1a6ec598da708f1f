"""One share of energy for all weights: each gets the smallest rank that keeps that share of its Σ σ².

The rule of thumb for a truncated SVD, with the spectrum in the metric of the objective. It does not know that one weight's energy
matters more to the model than another's.
"""

from twofold.allocate import Candidate, Choice, allocation
from twofold.allocate._shares import at_least, fit


@allocation("energy")
def energy(candidates: list[Candidate], budget: float) -> list[Choice]:
    return fit(candidates, budget, _keeping)


def _keeping(candidate: Candidate, share: float) -> Choice:
    import numpy as np

    assert candidate.values is not None
    sums = np.cumsum(candidate.values)
    return at_least(candidate, int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12))) + 1)
