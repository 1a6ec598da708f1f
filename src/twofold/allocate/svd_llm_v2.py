"""Shares by the logarithm of the truncation loss, among the weights of one kind (SVD-LLM V2, Wang et al., NAACL 2025).

Algorithm 1 of arXiv 2503.12340: with R the share of the parameters to remove and L the truncation loss ‖WX − W′X‖_F of a weight
at that share, a weight of a group of N gives up N · R · (1/log L) / Σ (1/log L) of its own. A group is the weights of one
kind, as all q_proj. X holds all the calibration tokens, so L² is their number times the loss that the spectrum gives.
"""

import math

from twofold.allocate import Candidate, Choice, allocation
from twofold.allocate._shares import fit, largest_within


@allocation("svd-llm-v2")
def svd_llm_v2(candidates: list[Candidate], budget: float) -> list[Choice]:
    keep = min(budget / sum(candidate.full_cost for candidate in candidates), 1.0)
    factors = removal_factors(candidates, keep)
    # The factors are taken once, at the budget. What ranks and the bounds 0 and 1 leave over is made up for by R.
    most = 1 / min(factors.values())  # at this R nothing is left of any weight

    def choose(candidate: Candidate, share: float) -> Choice:
        return largest_within(candidate, max(1 - (1 - share) * most * factors[candidate.name], 0.0))

    return fit(candidates, budget, choose)


def removal_factors(candidates: list[Candidate], keep: float) -> dict[str, float]:
    """Return what each weight gives up, relative to the mean of its kind; less where truncation loses more."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.kind, []).append(candidate)
    factors: dict[str, float] = {}
    for group in groups.values():
        inverse = {candidate.name: 1 / _log_loss(candidate, keep) for candidate in group}
        factors |= {name: len(group) * share / sum(inverse.values()) for name, share in inverse.items()}
    return factors


def _log_loss(candidate: Candidate, keep: float) -> float:
    """Return log L, L at least e: at 1 and below, which takes hardly any loss or few tokens, the formula has no meaning."""
    squared = candidate.tokens * largest_within(candidate, keep).loss(candidate)
    return math.log(max(math.sqrt(squared), math.e))
