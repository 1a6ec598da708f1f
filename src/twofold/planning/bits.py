"""Rank and bits as one choice: what each pair of them costs in bytes, and what it loses by truncation and by rounding.

The pairs that some other one beats in both are left out. What is left ascends in cost and falls in loss, which is all that an
allocation asks of a candidate, so it works on pairs as on ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from twofold.allocate import Candidate, Choice
from twofold.evidence.rounding import AUTO_BITS
from twofold.model.settings import Override
from twofold.model.target import Target
from twofold.model.weights import last_match
from twofold.planning.menu import Menu, PlanRequest
from twofold.planning.plan import PlanEntry
from twofold.planning.ranks import forced_rank
from twofold.planning.settings import Planning
from twofold.planning.storage import Storage

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
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if not best or option.loss < best[-1].loss:
            best.append(option)
    return best


def bit_options(
    request: PlanRequest,
    target: Target,
    tails: NDArray[np.float64],  # (k + 1,), the loss of each rank from 0 on
    override: Override | None,
) -> list[Option]:
    """Return all that may be chosen for one weight, beside leaving it as it is.

    Raises:
        TwofoldError: if an override asks for a rank that the weight has not.
    """
    if override is not None and override.dense:
        return []
    rounding = request.evidence.rounding[target.name]
    largest = max(min(int(np.count_nonzero(np.diff(tails))), min(target.shape) - 1), 1)
    ranks, options = request.ranks(largest), []
    if override is not None:
        ranks = np.array([min(max(forced_rank(target, override, "gauge"), 1), largest)])
    for bits in AUTO_BITS:
        storage = Storage(request.recipe, request.element, bits)
        lost = tails[ranks] + rounding.added(bits, ranks, tails[0] - tails[ranks])
        options += [
            Option(int(rank), bits, storage.bytes(target, int(rank)), float(loss))
            for rank, loss in zip(ranks, lost, strict=True)
        ]
        if override is None:
            options.append(Option(None, bits, storage.bytes(target, None), rounding.dense[bits]))
    return pareto(options)


def bit_menu(request: PlanRequest) -> Menu:
    """Return what may be chosen for every target: pairs of rank and bits."""
    overrides = {name: last_match(name, request.recipe.overrides) for name in request.by_name}
    tails = {name: request.tails(name, 0) for name in overrides}
    options = {
        name: bit_options(request, target, tails[name], overrides[name]) for name, target in request.by_name.items()
    }

    def candidate(target: Target) -> Candidate:
        """Return the options of one weight; a dense one has its full rank. An override leaves no choice to stay as it is."""
        pairs, whole = options[target.name], float(target.bytes(request.element))
        return Candidate(
            target.name,
            np.array([min(target.shape) if pair.rank is None else pair.rank for pair in pairs], dtype=np.int64),
            np.array([pair.bytes for pair in pairs], dtype=np.float64),
            np.array([pair.loss for pair in pairs], dtype=np.float64) * request.weight(tails[target.name]),
            None if overrides[target.name] is not None and pairs else whole,
            whole,
            kind=target.alike,
        )

    def entries(candidate: Candidate, choice: Choice) -> list[PlanEntry]:
        name, total = candidate.name, float(tails[candidate.name][0])
        pair = Option(None, None, 0, 0.0) if choice.index is None else options[name][choice.index]
        forced = overrides[name] is not None
        return [request.stored(request.by_name[name], pair.rank, pair.bits, (pair.loss, total), forced=forced)]

    return Menu([candidate(target) for target in request.targets.targets], {}, entries)


def with_fewest_bits(recipe: P) -> P:
    """Return settings whose ranks need no measuring: with the fewest bits in the place of those that are to be chosen."""
    if recipe.bits != "auto":
        return recipe
    return recipe.model_copy(update={"bits": str(AUTO_BITS[0]), "dense_bits": str(recipe.rest_bits or "none")})
