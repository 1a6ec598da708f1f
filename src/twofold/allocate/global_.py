"""One convex problem for the whole model: minimize Σ loss(r) subject to Σ cost(r) ≤ budget.

Each weight picks argmin loss + λ·cost among its ranks and dense; one multiplier λ serves them all, found by bisection. Costs are
concave in the gauge form and "dense" is a jump, so the last step of λ can leave some budget over; it is spent on the steps that
save most loss for their cost. The result never loses more than the uniform ranks at the same budget.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from twofold.allocate import Candidate, Choice, allocation
from twofold.allocate.uniform import uniform

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BISECTIONS = 100


class _Options:
    """The choices of one weight, dense included: what each costs and loses."""

    def __init__(self, candidate: Candidate) -> None:
        import numpy as np

        costs, losses = candidate.costs, candidate.losses
        indices: NDArray[np.int64] = np.arange(len(costs))
        if candidate.dense_cost is not None:
            # First, so that it wins a tie with full rank: it stores the same and is one product.
            costs = np.append(candidate.dense_cost, costs)
            losses = np.append(0.0, losses)
            indices = np.append(-1, indices)
        self.costs, self.losses, self.indices = costs, losses, indices

    def position(self, choice: Choice) -> int:
        """Where a choice stands among the options."""
        import numpy as np

        return int(np.flatnonzero(self.indices == (-1 if choice.index is None else choice.index))[0])

    def best(self, multiplier: float) -> int:
        return int((self.losses + multiplier * self.costs).argmin())

    def next_step(self, position: int, room: float) -> tuple[float, int] | None:
        """The affordable step up from a position that saves most loss for its cost: (−saving per cost, position)."""
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

    def choose(multiplier: float) -> tuple[list[int], float]:
        positions = [option.best(multiplier) for option in options]
        return positions, sum(float(o.costs[p]) for o, p in zip(options, positions, strict=True))

    low, high = 0.0, 1e-30
    positions, cost = choose(low)
    if cost > budget:
        while choose(high)[1] > budget and high < 1e30:
            high *= 10.0
        for _ in range(BISECTIONS):
            middle = (low * high) ** 0.5 if low > 0 else high / 2
            if choose(middle)[1] > budget:
                low = middle
            else:
                high = middle
            if low > 0 and high / low < 1 + 1e-12:
                break
        positions, cost = choose(high)
    positions = _spend(options, positions, budget - cost)
    # With few weights the jumps weigh more than the convex part; then the uniform ranks can be the better start.
    even = uniform(candidates, budget)
    start = [o.position(choice) for o, choice in zip(options, even, strict=True)]
    other = _spend(options, start, budget - sum(float(o.costs[p]) for o, p in zip(options, start, strict=True)))
    if _loss(options, other) < _loss(options, positions):
        positions = other
    return [Choice(None if o.indices[p] < 0 else int(o.indices[p])) for o, p in zip(options, positions, strict=True)]


def _loss(options: list[_Options], positions: list[int]) -> float:
    return sum(float(o.losses[p]) for o, p in zip(options, positions, strict=True))


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
        if extra > room:
            offer(i)
            continue
        room -= extra
        positions[i] = position
        offer(i)
    return positions
