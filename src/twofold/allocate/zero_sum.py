"""Components go where the running sum of their signed effect on the loss stays near zero (ZS-SVD, Abbasi et al., ICML 2026).

To first order, leaving out component i of a weight changes the mean loss by d_i = −⟨∂ℓ/∂W, W_i⟩, W_i its part of W; in the
paper's whitened coordinates −σ_i g_i. Every weight offers its smallest remaining component. While the sum of the changes so far
is not above zero the smallest abs(d) of those with d ≥ 0 goes, else the smallest of those with d < 0, until the budget is kept.
"""

from __future__ import annotations

import heapq
from typing import Any

from twofold.allocate import Candidate, Choice, Measured, allocation
from twofold.allocate._shares import at_least


def _measure(measurement: Any) -> Measured:  # (k,) of each weight, as its spectrum
    from twofold.evidence.first_order import component_scores

    return component_scores(measurement)


@allocation("zero-sum", needs={"next token", "whole model"}, measure=_measure, seconds=lambda price, _: price.sweep)
def zero_sum(candidates: list[Candidate], budget: float) -> list[Choice]:
    costs = [_costs(candidate) for candidate in candidates]
    left = [len(cost) - 1 for cost in costs]  # components that remain
    total = sum(cost[-1] for cost in costs)
    rising: list[tuple[float, int]] = []  # (abs(d), weight) with d ≥ 0
    falling: list[tuple[float, int]] = []  # and with d < 0

    def offer(i: int) -> None:
        scores = candidates[i].measured
        assert scores is not None
        if left[i] > candidates[i].ranks[0]:
            change = float(scores[left[i] - 1])
            heapq.heappush(rising if change >= 0 else falling, (abs(change), i))

    for i in range(len(candidates)):
        offer(i)
    drift = 0.0
    while total > budget and (rising or falling):
        heap = (rising or falling) if drift <= 0 else (falling or rising)
        size, i = heapq.heappop(heap)
        drift += size if heap is rising else -size
        total += costs[i][left[i] - 1] - costs[i][left[i]]
        left[i] -= 1
        offer(i)
    return [at_least(candidate, rank) for candidate, rank in zip(candidates, left, strict=True)]


def _costs(candidate: Candidate) -> list[float]:  # (k + 1,)
    """Return what each number of components stores: the weight stays dense until factors are smaller."""
    assert candidate.values is not None
    return [at_least(candidate, rank).cost(candidate) for rank in range(len(candidate.values) + 1)]
