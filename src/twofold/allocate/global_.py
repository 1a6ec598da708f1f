"""One convex problem for the whole model: minimize Σ loss(r) subject to Σ cost(r) ≤ budget.

Each weight picks argmin loss + λ·cost among its ranks and dense; one multiplier λ serves them all, found by bisection. Costs are
concave in the gauge form and "dense" is a jump, so the last step of λ can leave some budget over; it is spent on the steps that
save most loss for their cost. The result never loses more than the uniform ranks at the same budget.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from twofold.allocate import Candidate, Choice, allocation
from twofold.allocate.uniform import uniform

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BISECTIONS = 100


class _Options:
    """What the choices for one weight cost and lose; dense is first: it wins a tie with full rank, being one product."""

    def __init__(self, candidate: Candidate) -> None:
        import numpy as np

        dense = candidate.dense_cost
        self.first = 0 if dense is None else 1  # the position of the first rank
        self.costs = candidate.costs if dense is None else np.append(dense, candidate.costs)
        self.losses = candidate.losses if dense is None else np.append(0.0, candidate.losses)

    def position(self, choice: Choice) -> int:
        return 0 if choice.index is None else choice.index + self.first

    def choice(self, position: int) -> Choice:
        return Choice(None if position < self.first else position - self.first)

    def best(self, multiplier: float) -> int:
        return int((self.losses + multiplier * self.costs).argmin())

    def next_step(self, position: int, room: float) -> tuple[float, int] | None:
        """Find the affordable step up from a position that saves most loss for its cost: (−saving per cost, position)."""
        import numpy as np

        extra = self.costs - self.costs[position]
        saved = self.losses[position] - self.losses
        allowed = (extra > 0) & (extra <= room) & (saved > 0)
        if not allowed.any():
            return None
        rate = np.where(allowed, saved / np.where(allowed, extra, 1.0), -1.0)
        step = int(rate.argmax())
        return -float(rate[step]), step


@allocation("global", takes={"ranks", "structures", "pairs"}, compares=True)
def lagrangian(candidates: list[Candidate], budget: float) -> list[Choice]:
    options = [_Options(candidate) for candidate in candidates]
    costs, losses = [option.costs for option in options], [option.losses for option in options]

    def at(multiplier: float) -> list[int]:
        return [option.best(multiplier) for option in options]

    low, high = 0.0, 1e-30
    positions = at(low)
    if _total(costs, positions) > budget:
        while _total(costs, at(high)) > budget and high < 1e30:
            high *= 10.0
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high) if low > 0 else high / 2
            if _total(costs, at(middle)) > budget:
                low = middle
            else:
                high = middle
            if low > 0 and high / low < 1 + 1e-12:
                break
        positions = at(high)
    # With few weights the jumps weigh more than the convex part; then the uniform ranks can be the better start.
    even = [option.position(choice) for option, choice in zip(options, uniform(candidates, budget), strict=True)]
    spent = [_spend(options, start, budget - _total(costs, start)) for start in (positions, even)]
    best = min(spent, key=lambda positions: _total(losses, positions))
    return [option.choice(position) for option, position in zip(options, best, strict=True)]


def _total(rows: list[NDArray[np.float64]], positions: list[int]) -> float:
    total = (
        0.0  # not by ``sum``, which rounds otherwise from Python 3.12 on: web/src/allocate.ts adds in this order, too
    )
    for row, position in zip(rows, positions, strict=True):
        total += float(row[position])
    return total


def _spend(options: list[_Options], positions: list[int], room: float) -> list[int]:
    """Spend what is left of the budget, the best step first."""
    positions = list(positions)
    queue: list[tuple[float, int, int]] = []

    def offer(i: int) -> None:
        step = options[i].next_step(positions[i], room)
        if step is not None:
            heapq.heappush(queue, (step[0], i, step[1]))

    for i in range(len(options)):
        offer(i)
    while queue:
        _, i, position = heapq.heappop(queue)
        extra = float(options[i].costs[position] - options[i].costs[positions[i]])
        if extra <= 0:
            continue
        if extra <= room:
            room -= extra
            positions[i] = position
        offer(i)
    return positions
