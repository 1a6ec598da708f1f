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

from twofold.allocate import Candidate, Choice
from twofold.evidence.rounding import AUTO_BITS, Rounding
from twofold.model.settings import Override
from twofold.model.target import Target
from twofold.model.weights import last_match
from twofold.planning.menu import Asked, Menu, aligned
from twofold.planning.plan import PlanEntry
from twofold.planning.ranks import forced_rank
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
    """Return those that no other one beats in bytes and loss, by ascending bytes."""
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
    """Return all that may be chosen for one weight, beside leaving it as it is.

    Raises:
        TwofoldError: if an override asks for a rank that the weight has not.
    """
    m, n = target.out_features, target.in_features
    if override is not None and override.dense:
        return []
    options: list[Option] = []
    largest = max(min(int(np.count_nonzero(np.diff(tails))), min(m, n) - 1), 1)
    forced = None if override is None else forced_rank(target, override, "gauge")
    if forced is None:
        ranks = aligned(np.arange(min(max(recipe.min_rank, 1), largest), largest + 1), recipe.aligned)
    else:
        ranks = np.array([min(max(forced, 1), largest)])
    for bits in AUTO_BITS:
        storage = Storage(recipe, element, bits)
        lost = tails[ranks] + rounding.added(bits, ranks, tails[0] - tails[ranks])
        options += [
            Option(int(rank), bits, storage.bytes(target, int(rank)), float(loss))
            for rank, loss in zip(ranks, lost, strict=True)
        ]
        if forced is None:
            size = dense_integers(target, bits, recipe.group(bits)) + element
            options.append(Option(None, bits, size, rounding.dense[bits]))
    return pareto(options)


def _candidate(
    target: Target, options: list[Option], element: int, weight: float, *, forced: bool = False
) -> Candidate:
    """Return the options of one weight as a candidate of an allocation; a dense one has the rank of the whole weight.

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


def bit_menu(asked: Asked) -> Menu:
    """Return what may be chosen for every target: pairs of rank and bits."""
    recipe, candidates = asked.recipe, []
    tails: dict[str, NDArray[np.float64]] = {}
    pairs: dict[str, list[Option]] = {}
    overrides: dict[str, Override | None] = {}
    for target in asked.targets.targets:
        name = target.name
        overrides[name], tails[name] = last_match(name, recipe.overrides), asked.tails(name, 0)
        rounding = asked.evidence.rounding[name]
        pairs[name] = bit_options(target, rounding, tails[name], recipe, asked.element, overrides[name])
        weight, forced = asked.weight(tails[name]), overrides[name] is not None
        candidates.append(_candidate(target, pairs[name], asked.element, weight, forced=forced))

    def entry(target: Target, choice: Choice) -> PlanEntry:
        total, forced = float(tails[target.name][0]), overrides[target.name] is not None
        if choice.index is None:
            return asked.stored(target, None, None, 0.0, total, forced=forced)
        pair = pairs[target.name][choice.index]
        return asked.stored(target, pair.rank, pair.bits, pair.loss, total, forced=forced)

    def entries(choices: Mapping[str, Choice]) -> list[PlanEntry]:
        return [entry(target, choices[target.name]) for target in asked.targets.targets]

    return Menu(candidates, {}, entries)


def stand_in(recipe: P) -> P:
    """Return settings whose ranks need no measuring: with the fewest bits in the place of those that are to be chosen."""
    if recipe.bits != "auto":
        return recipe
    return recipe.model_copy(update={"bits": str(AUTO_BITS[0]), "dense_bits": str(recipe.rest_bits or "none")})
