"""Allocations by name, one file each: (candidates, budget) → a rank, or dense, for every weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from twofold.registry import Registry
from twofold.settings.base import Settings
from twofold.settings.price import Price

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind: TypeAlias = Literal["ranks", "structures", "pairs"]  # of choices; a pair is a rank and bits


@dataclass(frozen=True)
class Candidate:
    """One weight and what each of its ranks costs and loses."""

    name: str
    ranks: NDArray[np.int64]  # (c,), those that may be chosen, ascending
    costs: NDArray[np.float64]  # (c,), what each stores
    losses: NDArray[np.float64]  # (c,), what each loses
    dense_cost: float | None  # of leaving the weight as it is, at no loss; None where that is not allowed
    full_cost: float  # m · n in the unit of the costs
    values: NDArray[np.float64] | None = None  # σ² (k,), largest first; None if no spectrum was taken
    kind: str = ""  # the last part of the name, as q_proj, behind the stack if there are several
    tokens: int = 1  # that the losses are the mean over
    measured: NDArray[np.float64] | None = None  # what the allocation measures of this weight


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

    def rank(self, candidate: Candidate) -> int | None:
        return None if self.index is None else int(candidate.ranks[self.index])


def total_cost(candidates: list[Candidate], choices: list[Choice]) -> float:
    """Return what the choices for all weights cost together."""
    return sum(choice.cost(candidate) for choice, candidate in zip(choices, candidates, strict=True))


def cheapest(candidate: Candidate) -> Choice:
    """Return the choice that stores least."""
    smallest = int(candidate.costs.argmin()) if len(candidate.costs) else None
    if smallest is None or (candidate.dense_cost is not None and candidate.dense_cost <= candidate.costs[smallest]):
        return Choice(None)
    return Choice(smallest)


Allocate: TypeAlias = Callable[[list[Candidate], float], list[Choice]]
Measured: TypeAlias = "Mapping[str, NDArray[np.float64]]"  # by the names of weights
Measure: TypeAlias = Callable[[Any], Measured]


@dataclass(frozen=True)
class Allocation:
    """An allocation by its name."""

    name: str
    choose: Allocate
    needs: frozenset[str]  # capabilities, as run/check.py has them
    takes: frozenset[Kind]
    measure: Measure | None
    again: bool
    settings: type[Settings] | None
    seconds: Callable[[Price, Settings], float] | None
    blind: bool
    compares: bool

    def __call__(self, candidates: list[Candidate], budget: float) -> list[Choice]:
        return self.choose(candidates, budget)


ALLOCATIONS: Registry[Allocation] = Registry("allocation", __name__)


class Allocating(Settings):
    """How ranks are shared out."""

    TITLE = "Method"

    allocate: Annotated[str, Field(description=f"how ranks are shared out: {', '.join(ALLOCATIONS.names())}")] = (
        "global"
    )


def allocation(
    name: str,
    *,
    needs: Iterable[str] = (),
    takes: Iterable[Kind] = ("ranks",),
    measure: Measure | None = None,
    again: bool = False,
    settings: type[Settings] | None = None,
    seconds: Callable[[Price, Settings], float] | None = None,
    blind: bool = False,
    compares: bool = False,
) -> Callable[[Allocate], Allocate]:
    """Register a function (candidates, budget) → choices as an allocation.

    Args:
        takes: the kinds of candidates that it knows.
        measure: gives each weight what the allocation looks at beside its spectrum, from a ``twofold.evidence.base.Measurement``.
        again: whether the moments are measured once more on the model that it has planned, and it plans anew by the mean of both.
        seconds: what its measuring takes.
        blind: whether it looks at sizes alone, so that it needs no losses.
        compares: whether it sets the losses of one weight against those of another, so that they must be on one scale.
    """

    def register(choose: Allocate) -> Allocate:
        more = (measure, again, settings, seconds, blind, compares)
        ALLOCATIONS.add(name, Allocation(name, choose, frozenset(needs), frozenset(takes), *more))
        return choose

    return register
