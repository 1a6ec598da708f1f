"""What may be chosen of every weight, and what a choice says in the plan: the common part of ranks, bits and structures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from twofold.allocate import ALLOCATIONS, Candidate, Choice
from twofold.model.target import DenseWeight, Target, Targets
from twofold.nn.int_matrix import int_bytes
from twofold.planning.evidence import Evidence
from twofold.planning.plan import DenseEntry, PlanEntry
from twofold.planning.settings import Planning
from twofold.planning.storage import Storage, dense_integers


@dataclass(frozen=True)
class Menu:
    """The choices: those of all candidates, those that an override has made, and the entries of what is chosen by name."""

    candidates: list[Candidate]
    forced: dict[str, Choice]
    entries: Callable[[Mapping[str, Choice]], list[PlanEntry]]


@dataclass(frozen=True)
class Asked:
    """What is planned.

    Args:
        spectra: σ² (k,) of every target, largest first; None for ranks that need no loss.
        element: bytes of a number.
        relative: whether losses are shares of each target's own total.
    """

    targets: Targets
    spectra: Mapping[str, NDArray[np.float64]] | None
    recipe: Planning
    element: int
    evidence: Evidence = field(default_factory=Evidence)
    relative: bool = False

    @property
    def scale(self) -> int:
        """What a number costs: its bytes, or 1."""
        return self.element if self.recipe.in_bytes else 1

    def values(self, name: str) -> NDArray[np.float64] | None:  # (k,)
        return None if self.spectra is None else np.asarray(self.spectra[name], dtype=np.float64)

    def tails(self, name: str, length: int) -> NDArray[np.float64]:  # (k + 1,)
        """Return what each rank from 0 on loses."""
        values = self.values(name)
        return np.zeros(length + 1) if values is None else np.append(np.cumsum(values[::-1])[::-1], 0.0)

    def weight(self, tails: NDArray[np.float64], layers: int = 1) -> float:
        """Return what makes losses comparable from weight to weight."""
        return layers / tails[0] if self.relative and tails[0] > 0 else 1.0

    def stored(
        self, target: Target, rank: int | None, bits: int | None, lost: float, total: float, *, forced: bool
    ) -> PlanEntry:
        """Return the entry of a weight by itself, at a rank or dense, in floating point or in integers."""
        storage = Storage(self.recipe, self.element, bits)
        numbers = target.size if rank is None else storage.numbers(target, rank)
        reason = self.reason(rank, bits, forced=forced)
        entry = self.entry(target, rank, storage.form(target), numbers, (lost, total), reason)
        if bits is None:
            return entry
        group = self.recipe.group(bits)
        size = dense_integers(target, bits, group) if rank is None else storage.integers(target, rank)
        return entry.model_copy(update={"bits": bits, "scale_group": group, "quantized_bytes": size})

    def entry(
        self,
        target: Target,
        rank: int | None,
        form: str,
        numbers: int,
        losses: tuple[float, float] | None,  # left out, in all
        reason: str,
        basis: str | None = None,
    ) -> PlanEntry:
        """Return the entry of a weight."""
        lost, total = losses if losses is not None and self.spectra is not None else (None, None)
        return PlanEntry(
            name=target.name,
            kind=target.kind,
            layer=target.layer,
            out_features=target.out_features,
            in_features=target.in_features,
            group=self.targets.groups.get(target.name, target.name),
            rank=rank,
            form=None if rank is None else form,  # type: ignore[arg-type]
            basis=None if rank is None else basis,
            transposed=target.transposed,
            bias=target.bias,
            numbers_before=target.size,
            numbers_after=numbers,
            predicted_loss=lost,
            total_loss=total,
            reason=reason,
        )

    def reason(self, rank: int | None, bits: int | None = None, *, forced: bool) -> str:
        """Say why a weight has its rank, or is dense."""
        allocate = self.recipe.allocate
        if self.recipe.bits == "auto" and bits is not None:
            kept = "at full rank" if rank is None else "by rank and bits"
            return f"an override says so, {bits} bits" if forced else f"{allocate} allocation {kept}, {bits} bits"
        if rank is not None:
            return "an override says so" if forced else f"{allocate} allocation"
        if forced:
            return "dense: an override asks for as much"
        if not ALLOCATIONS.get(allocate).blind:
            return "dense: at this budget every rank that saves numbers would lose more here than elsewhere"
        return "dense: full rank stores as much"

    def dense(self) -> list[DenseEntry]:
        """Return the entries of the parameters that are no targets."""
        return [self._dense(weight) for weight in self.targets.dense]

    def _dense(self, weight: DenseWeight) -> DenseEntry:
        """Say what is done with a parameter that is no target: nothing, or it is rounded to integers."""
        entry = DenseEntry(name=weight.name, shape=list(weight.shape), numbers=weight.size, reason=weight.reason)
        bits = self.recipe.rest_bits
        if bits is None or not weight.layer:
            return entry
        rows, columns = reversed(weight.shape) if weight.layer == "transposed" else weight.shape
        group = self.recipe.group(bits)
        size = int_bytes(rows, columns, bits, group) + self.element * (1 + len(weight.tied))
        reason = f"{weight.reason}; rounded to {bits} bits"
        return entry.model_copy(update={"bits": bits, "scale_group": group, "quantized_bytes": size, "reason": reason})


def aligned(ranks: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """Return the ranks that are multiples of a number, or the smallest one where none is."""
    multiples = ranks[ranks % multiple == 0]
    return multiples if len(multiples) else ranks[:1]


def at_most(values: NDArray[np.generic], most: float) -> Choice:
    """Choose the last of ascending values that is within a bound, or the first one."""
    return Choice(max(int(np.searchsorted(values, most, side="right")) - 1, 0))
