"""Components go where the running sum of their signed effect on the loss stays near zero (ZS-SVD, Abbasi et al., ICML 2026).

To first order, leaving out component i of a weight changes the mean loss by d_i = −⟨∂ℓ/∂W, W_i⟩, W_i its part of W; in the
paper's whitened coordinates −σ_i g_i. Every weight offers its smallest remaining component. While the sum of the changes so far
is not above zero the smallest abs(d) of those with d ≥ 0 goes, else the smallest of those with d < 0, until the budget is kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twofold.allocate import Candidate, Choice, allocation
from twofold.allocate._shares import at_least
from twofold.settings.base import Settings
from twofold.settings.price import Price

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _measure(
    measurement: Any,
) -> Mapping[str, NDArray[np.float64]]:  # (k,) of each weight, in the order of its spectrum
    from twofold.evidence.first_order import component_scores

    return component_scores(measurement)


def _seconds(price: Price, settings: Settings) -> float:
    return price.sweep


@allocation("zero-sum", needs={"next token", "whole model"}, measure=_measure, seconds=_seconds)
def zero_sum(candidates: list[Candidate], budget: float) -> list[Choice]:
    costs = [_costs(candidate) for candidate in candidates]
    left = [len(cost) - 1 for cost in costs]  # components that remain
    total = sum(float(cost[-1]) for cost in costs)
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
        first, second = (rising, falling) if drift <= 0 else (falling, rising)
        chosen = first or second
        size, i = heapq.heappop(chosen)
        drift += size if chosen is rising else -size
        total += float(costs[i][left[i] - 1] - costs[i][left[i]])
        left[i] -= 1
        offer(i)
    return [at_least(candidate, rank) for candidate, rank in zip(candidates, left, strict=True)]


def _costs(candidate: Candidate) -> NDArray[np.float64]:  # (k + 1,)
    """What is stored while so many components remain: the weight stays dense until factors are smaller."""
    import numpy as np

    assert candidate.values is not None
    return np.array([at_least(candidate, rank).cost(candidate) for rank in range(len(candidate.values) + 1)])
