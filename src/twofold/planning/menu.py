"""What may be chosen for every weight, and what a choice says in the plan: the common part of ranks, bits and structures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofold.allocate import ALLOCATIONS, Candidate, Choice
from twofold.model.target import DenseWeight, Target, Targets
from twofold.nn.int_matrix import int_bytes
from twofold.objectives import OBJECTIVES
from twofold.planning.evidence import Evidence
from twofold.planning.plan import DenseEntry, PlanEntry
from twofold.planning.settings import Planning
from twofold.planning.storage import Storage


@dataclass(frozen=True)
class Menu:
    """The candidates, those of them that an override has decided, and the entries of the plan that a choice makes."""

    candidates: list[Candidate]
    forced: dict[str, Choice]
    entries: Callable[[Candidate, Choice], list[PlanEntry]]


@dataclass(frozen=True)
class PlanRequest:
    """What is planned."""

    targets: Targets
    spectra: Mapping[str, NDArray[np.float64]] | None  # σ² (k,), largest first; None for ranks that need no loss
    recipe: Planning
    element: int  # bytes of a number
    evidence: Evidence = field(default_factory=Evidence)

    @cached_property
    def by_name(self) -> dict[str, Target]:
        """The targets by their names, in order."""
        return {target.name: target for target in self.targets.targets}

    @property
    def scale(self) -> int:
        """The cost of a number: its bytes, or 1."""
        return self.element if self.recipe.in_bytes else 1

    @property
    def relative(self) -> bool:
        """Whether losses count as shares of each target's own total: where they are compared and differ in scale."""
        compares = self.spectra is not None and ALLOCATIONS.get(self.recipe.allocate).compares
        return compares and OBJECTIVES.get(self.recipe.objective).loss != "nats"

    def values(self, name: str) -> NDArray[np.float64] | None:  # (k,)
        return None if self.spectra is None else np.asarray(self.spectra[name], dtype=np.float64)

    def tails(self, name: str, length: int) -> NDArray[np.float64]:  # (k + 1,)
        """Return what each rank from 0 on loses; nothing, up to a length, where there are no spectra."""
        values = self.values(name)
        return np.zeros(length + 1) if values is None else np.append(np.cumsum(values[::-1])[::-1], 0.0)

    def weight(self, tails: NDArray[np.float64], layers: int = 1) -> float:
        """Return the factor that makes losses comparable from weight to weight."""
        return layers / tails[0] if self.relative and tails[0] > 0 else 1.0

    def ranks(self, largest: int) -> NDArray[np.int64]:  # ascending
        """Return the ranks up to the largest one that the settings allow: multiples from the smallest on, or that one alone."""
        ranks = np.arange(max(min(self.recipe.min_rank, largest), 1), largest + 1)
        multiples = ranks[ranks % self.recipe.aligned == 0]
        return multiples if len(multiples) else ranks[:1]

    def stored(
        self, target: Target, rank: int | None, bits: int | None, losses: tuple[float, float], *, forced: bool
    ) -> PlanEntry:
        """Return the entry of a weight by itself, at a rank or dense, in floating point or in integers."""
        storage, reason = Storage(self.recipe, self.element, bits), self.reason(rank, bits, forced=forced)
        more = {} if bits is None else self.rounded(bits, storage.integers(target, rank))
        return self.entry(target, rank, storage.form(target), storage.numbers(target, rank), losses, reason, **more)

    def entry(
        self,
        target: Target,
        rank: int | None,
        form: str,
        numbers: int,
        losses: tuple[float, float] | None,  # left out, in all
        reason: str,
        **more: Any,
    ) -> PlanEntry:
        """Return the entry of a weight; ``more`` are fields that others lack."""
        lost, total = losses if losses is not None and self.spectra is not None else (None, None)
        return PlanEntry(
            **vars(target),
            kind=target.kind,
            layer=target.layer,
            group=self.targets.groups.get(target.name, target.name),
            rank=rank,
            form=None if rank is None else form,  # type: ignore[arg-type]
            numbers_before=target.size,
            numbers_after=numbers,
            predicted_loss=lost,
            total_loss=total,
            reason=reason,
            **more,
        )

    def rounded(self, bits: int, size: int) -> dict[str, int | None]:
        """Return what an entry says of integers that take so many bytes."""
        return {"bits": bits, "scale_group": self.recipe.group(bits), "quantized_bytes": size}

    def reason(self, rank: int | None, bits: int | None = None, *, forced: bool) -> str:
        """Say why a weight has its rank, or is dense."""
        allocate = self.recipe.allocate
        if self.recipe.bits == "auto" and bits is not None:
            what = "at full rank" if rank is None else "by rank and bits"
            return f"an override says so, {bits} bits" if forced else f"{allocate} allocation {what}, {bits} bits"
        if rank is not None:
            return "an override says so" if forced else f"{allocate} allocation"
        if forced:
            return "dense: an override asks for as much"
        if not ALLOCATIONS.get(allocate).blind:
            return "dense: at this budget every rank that saves numbers would lose more here than elsewhere"
        return "dense: full rank stores as much"

    @cached_property
    def dense(self) -> list[DenseEntry]:
        """The entries of the parameters that are no targets."""
        return [self._dense(weight) for weight in self.targets.dense]

    def _dense(self, weight: DenseWeight) -> DenseEntry:
        """Return the entry of a parameter that is no target: it stays as it is, or is rounded to integers."""
        bits, reason, more = self.recipe.rest_bits, weight.reason, {}
        if bits is not None and weight.layer:
            rows, columns = reversed(weight.shape) if weight.layer == "transposed" else weight.shape
            size = int_bytes(rows, columns, bits, self.recipe.group(bits)) + self.element * (1 + len(weight.tied))
            reason, more = f"{reason}; rounded to {bits} bits", self.rounded(bits, size)
        return DenseEntry(
            name=weight.name,
            shape=list(weight.shape),
            numbers=weight.size,
            reason=reason,
            element_bytes=weight.element_bytes,
            **more,
        )


def at_most(values: NDArray[np.generic], most: float) -> Choice:
    """Choose the last of ascending values that is within a bound, or the first one."""
    return Choice(max(int(np.searchsorted(values, most, side="right")) - 1, 0))
