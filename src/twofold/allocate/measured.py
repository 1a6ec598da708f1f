"""Global, on second-order losses that are measured token by token and not taken from the spectrum (planning/evidence).

The spectrum says what a rank loses if a layer's inputs and gradients are independent of one another. Here that is not assumed:
the loss of a rank is ½ E[(gᵀ ΔW x)²] over tokens, with the same components in the same order. Few tokens may make a larger rank
seem to lose more; it counts as much as the next smaller one then.
"""

from dataclasses import replace

import numpy as np

from twofold.allocate.base import Candidate, Choice, allocation
from twofold.allocate.lagrangian import lagrangian


@allocation("measured", needs={"curve"})
def measured(candidates: list[Candidate], budget: float) -> list[Choice]:
    return lagrangian([_with_curve(candidate) for candidate in candidates], budget)


def _with_curve(candidate: Candidate) -> Candidate:
    assert candidate.curve is not None
    falling = np.minimum.accumulate(candidate.curve)
    return replace(candidate, losses=falling[candidate.ranks])
