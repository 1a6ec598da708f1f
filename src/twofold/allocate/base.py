"""What an allocation is: a function from candidates and a budget to a rank, or dense, for every weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from twofold.errors import TwofoldError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Candidate:
    """One weight and what each of its ranks costs and loses.

    ``ranks`` (c,) are those that may be chosen, ascending; ``costs`` (c,) what each stores and ``losses`` (c,) what each
    loses. ``dense_cost`` is that of leaving the weight as it is, at no loss; None where that is not allowed.
    """

    name: str
    ranks: NDArray[np.int64]
    costs: NDArray[np.float64]
    losses: NDArray[np.float64]
    dense_cost: float | None
    full_cost: float  # m · n in the unit of the costs
    values: NDArray[np.float64] | None = None  # σ² (k,), largest first; None if no spectrum was taken
    kind: str = ""  # the last part of the name, as q_proj
    tokens: int = 1  # that the losses are the mean over
    perplexities: NDArray[np.float64] | None = None  # of the model with this weight alone at each share of a grid
    scores: NDArray[np.float64] | None = (
        None  # (k,), first-order change of the loss without each component, nats per token
    )
    curve: NDArray[np.float64] | None = None  # (k + 1,), second-order loss of each rank from 0 on, nats per token


@dataclass(frozen=True)
class Choice:
    """What was chosen for one weight: an index into its ranks, or None for dense."""

    index: int | None

    def cost(self, candidate: Candidate) -> float:
        if self.index is None:
            assert candidate.dense_cost is not None
            return candidate.dense_cost
        return float(candidate.costs[self.index])

    def loss(self, candidate: Candidate) -> float:
        return 0.0 if self.index is None else float(candidate.losses[self.index])


BISECTIONS = 50
Allocate = Callable[[list[Candidate], float], list[Choice]]
Measurement = Literal["perplexities", "scores", "curve"]


@dataclass(frozen=True)
class Allocation:
    """An allocation by its name.

    ``needs`` are the fields of a candidate that are measured on the model for it. ``again``: the moments are measured once more
    on the model that it has planned, and it plans anew by the mean of both.
    """

    name: str
    needs: frozenset[Measurement]
    choose: Allocate
    again: bool = False

    def __call__(self, candidates: list[Candidate], budget: float) -> list[Choice]:
        return self.choose(candidates, budget)


ALLOCATIONS: dict[str, Allocation] = {}


def allocation(name: str, *, needs: Iterable[Measurement] = (), again: bool = False) -> Callable[[Allocate], Allocate]:
    """Register a function (candidates, budget) → choices as an allocation."""

    def register(function: Allocate) -> Allocate:
        ALLOCATIONS[name] = Allocation(name, frozenset(needs), function, again)
        return function

    return register


def get_allocation(name: str) -> Allocation:
    """The allocation of a name.

    Raises:
        TwofoldError: if there is none.
    """
    if name not in ALLOCATIONS:
        raise TwofoldError(f"there is no allocation {name!r}; choose one of {', '.join(sorted(ALLOCATIONS))}")
    return ALLOCATIONS[name]


def fit(
    candidates: list[Candidate],
    budget: float,
    choose: Callable[[Candidate, float], Choice],
) -> list[Choice]:
    """The largest share in [0, 1] whose choices keep the budget, found by bisection, and its choices.

    Args:
        choose: the choice for one weight at a share; a larger share must not cost less.
    """

    def at(share: float) -> tuple[list[Choice], float]:
        choices = [choose(candidate, share) for candidate in candidates]
        return choices, sum(choice.cost(c) for choice, c in zip(choices, candidates, strict=True))

    choices, cost = at(1.0)
    if cost <= budget:
        return choices
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if at(middle)[1] > budget:
            high = middle
        else:
            low = middle
    return at(low)[0]


def at_least(candidate: Candidate, rank: float) -> Choice:
    """The smallest allowed rank that is not below ``rank``; dense where that stores no more, or there is no such rank."""
    index = int(np.searchsorted(candidate.ranks, rank))
    dense = candidate.dense_cost
    if index >= len(candidate.ranks):
        return Choice(None) if dense is not None else Choice(len(candidate.ranks) - 1)
    if dense is not None and dense <= candidate.costs[index]:
        return Choice(None)
    return Choice(index)


def largest_within(candidate: Candidate, share: float) -> Choice:
    """The largest rank that stores at most a share of the weight; full rank is factored where it stores as much as dense."""
    allowed = share * candidate.full_cost * (1 + 1e-9)
    fits = int(np.searchsorted(candidate.costs, allowed, side="right")) - 1
    dense = candidate.dense_cost
    if dense is not None and dense <= allowed and (fits < 0 or candidate.costs[fits] < dense):
        return Choice(None)
    return Choice(fits) if fits >= 0 else cheapest(candidate)


def cheapest(candidate: Candidate) -> Choice:
    """The choice that stores least."""
    smallest = int(candidate.costs.argmin()) if len(candidate.costs) else None
    if smallest is None or (candidate.dense_cost is not None and candidate.dense_cost <= candidate.costs[smallest]):
        return Choice(None)
    return Choice(smallest)
