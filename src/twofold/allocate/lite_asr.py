"""The smallest rank of each weight that keeps a share of the variance of its outputs: LiteASR's rule, scaled to a budget.

Published are 0.99 for the weights of attention and 0.999 for all others, ranks that are multiples of 16, and dense weights where
two factors would store no more: above half of the width in attention, and above 0.8 of it in an MLP of four times the width.
Here the budget decides: both leave out the published share of variance times one factor, which is found by bisection, so that it
is 1 where the budget is what the published rule stores. The multiple is ``rank_multiple``, and dense is what stores no more.
Source: LiteASR, Kamahori et al., EMNLP 2025 (arXiv 2502.20583), and the code that was released with it.
"""

from __future__ import annotations

from twofold.allocate import Candidate, Choice, allocation
from twofold.allocate._shares import at_least, fit

ATTENTION, OTHERS = 0.01, 0.001  # of the variance, left out
LEAST = 1e-4  # factor of what is left out


@allocation("lite-asr")
def lite_asr(candidates: list[Candidate], budget: float) -> list[Choice]:
    def choose(
        candidate: Candidate, share: float
    ) -> Choice:  # the share of the way, in decades, from all left out to none
        return keeping(candidate, LEAST**share / OTHERS ** (1 - share) if share < 1 else 0.0)

    return fit(candidates, budget, choose)


def keeping(candidate: Candidate, factor: float) -> Choice:
    """Choose the smallest rank that leaves out at most the published share of the variance times a factor."""
    import numpy as np

    assert candidate.values is not None
    left_out = min(factor * (ATTENTION if is_attention(candidate.name) else OTHERS), 1.0)
    sums = np.cumsum(candidate.values)
    # The published rule asks for more than the share, and so does this one.
    return at_least(candidate, max(int(np.searchsorted(sums, (1 - left_out) * sums[-1], side="right")) + 1, 1))


def is_attention(name: str) -> bool:
    """Say whether a weight stands in an attention, by the names on its path."""
    return any(word in name.lower() for word in ("attn", "attention"))
