"""Rank and bits as one choice: what each pair of them costs in bytes, and what it loses by truncation and by rounding.

The pairs that some other one beats in both are left out. What is left ascends in cost and falls in loss, which is all that an
allocation asks of a candidate, so the global one works on pairs as it does on ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from twofold.allocate import Candidate
from twofold.errors import TwofoldError
from twofold.evidence.rounding import AUTO_BITS, Rounding
from twofold.linalg.gauge import gauge_rank
from twofold.model.settings import Override
from twofold.model.target import Target, Targets
from twofold.model.weights import last_match
from twofold.planning.evidence import Evidence
from twofold.planning.settings import Planning
from twofold.planning.storage import Storage, dense_integers

P = TypeVar("P", bound=Planning)


@dataclass(frozen=True)
class Option:
    """One way to store a weight."""

    rank: int | None  # None: dense
    bits: int | None  # None: in the dtype of the checkpoint
    bytes: int
    loss: float


def pareto(options: list[Option]) -> list[Option]:
    """Those that no other one beats in bytes and loss, by ascending bytes."""
    best: list[Option] = []
    for option in sorted(options, key=lambda one: (one.bytes, one.loss)):
        if not best or option.loss < best[-1].loss:
            best.append(option)
    return best


def bit_options(
    target: Target,
    rounding: Rounding,
    tails: NDArray[np.float64],  # (k + 1,), the loss of each rank from 0 on
    recipe: Planning,
    element: int,
    override: Override | None,
) -> list[Option]:
    """All that may be chosen for one weight, beside leaving it as it is.

    Raises:
        TwofoldError: if an override asks for a rank that the weight has not.
    """
    m, n = target.out_features, target.in_features
    if override is not None and override.dense:
        return []
    options: list[Option] = []
    largest = max(min(int(np.count_nonzero(np.diff(tails))), min(m, n) - 1), 1)
    forced = None if override is None else _forced(target, override)
    for bits in AUTO_BITS:
        storage = Storage(recipe, element, bits)
        ranks = _ranks(forced, largest, recipe)
        lost = tails[ranks] + rounding.added(bits, ranks, tails[0] - tails[ranks])
        options += [
            Option(int(rank), bits, storage.bytes(target, int(rank)), float(loss))
            for rank, loss in zip(ranks, lost, strict=True)
        ]
        if forced is None:
            size = dense_integers(target, bits, recipe.group(bits)) + element
            options.append(Option(None, bits, size, rounding.dense[bits]))
    return pareto(options)


def _ranks(forced: int | None, largest: int, recipe: Planning) -> NDArray[np.int64]:
    """The ranks that may be chosen."""
    if forced is not None:
        return np.array([min(max(forced, 1), largest)])
    ranks = np.arange(min(max(recipe.min_rank, 1), largest), largest + 1)
    aligned = ranks[ranks % recipe.aligned == 0]
    return aligned if len(aligned) else ranks[:1]


def _forced(target: Target, override: Override) -> int:
    """The rank that an override asks for."""
    m, n = target.out_features, target.in_features
    if override.rank is not None:
        if override.rank > min(m, n):
            raise TwofoldError(
                f"the override of {target.name} asks for rank {override.rank}, above its full rank {min(m, n)}"
            )
        return override.rank
    assert override.keep is not None
    return gauge_rank(m, n, override.keep * target.size)


def _candidate(
    target: Target, options: list[Option], element: int, weight: float, *, forced: bool = False
) -> Candidate:
    """The options of one weight as a candidate of an allocation; the ranks of dense ones are those of the whole weight.

    Args:
        weight: that makes losses comparable from weight to weight.
        forced: whether an override chose among the options, so that the weight may not be left as it is if there are any.
    """
    full = min(target.out_features, target.in_features)
    return Candidate(
        target.name,
        np.array([full if one.rank is None else one.rank for one in options], dtype=np.int64),
        np.array([one.bytes for one in options], dtype=np.float64),
        np.array([one.loss for one in options], dtype=np.float64) * weight,
        None if forced and options else float(target.size * element),
        float(target.size * element),
        None,
        target.kind,
    )


def bit_candidates(
    targets: Targets,
    spectra: Mapping[str, NDArray[np.float64]],
    recipe: Planning,
    element: int,
    relative: bool,
    evidence: Evidence,
) -> tuple[list[Candidate], dict[str, NDArray[np.float64]], dict[str, list[Option]]]:
    """What may be chosen for every target, the loss of each rank from 0 on, and the pairs that the choices stand for.

    Args:
        relative: whether losses are shares of each target's own total.
    """
    candidates: list[Candidate] = []
    tails_of: dict[str, NDArray[np.float64]] = {}
    pairs: dict[str, list[Option]] = {}
    for target in targets.targets:
        values = np.asarray(spectra[target.name], dtype=np.float64)
        tails = tails_of[target.name] = np.append(np.cumsum(values[::-1])[::-1], 0.0)
        override = last_match(target.name, recipe.overrides)
        found = bit_options(target, evidence.rounding[target.name], tails, recipe, element, override)
        weight = 1.0 / tails[0] if relative and tails[0] > 0 else 1.0
        pairs[target.name] = found
        candidates.append(_candidate(target, found, element, weight, forced=override is not None))
    return candidates, tails_of, pairs


def stand_in(recipe: P) -> P:
    """Return settings whose ranks need no measuring: with the fewest bits in the place of those that are to be chosen."""
    if recipe.bits != "auto":
        return recipe
    return recipe.model_copy(update={"bits": str(AUTO_BITS[0]), "dense_bits": str(recipe.rest_bits or "none")})
