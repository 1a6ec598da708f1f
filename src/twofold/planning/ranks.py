"""The ranks that a weight may have by itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from twofold.allocate import Candidate, Choice
from twofold.errors import TwofoldError
from twofold.linalg.gauge import gauge_rank
from twofold.model.settings import Override
from twofold.model.target import Target
from twofold.model.weights import last_match
from twofold.planning.menu import Asked, Menu, aligned, at_most
from twofold.planning.plan import PlanEntry
from twofold.planning.storage import Storage, dense_integers


def rank_menu(asked: Asked) -> Menu:
    """Return what may be chosen for every target."""
    candidates = [_candidate(asked, target) for target in asked.targets.targets]
    by_name = {candidate.name: candidate for candidate in candidates}
    storage = Storage(asked.recipe, asked.element, asked.recipe.fixed_bits)
    forced = {
        target.name: _forced(target, override, by_name[target.name], storage)
        for target in asked.targets.targets
        if (override := last_match(target.name, asked.recipe.overrides)) is not None
    }

    def entry(target: Target, choice: Choice) -> PlanEntry:
        tails = asked.tails(target.name, min(target.out_features, target.in_features))
        rank = None if choice.index is None else int(by_name[target.name].ranks[choice.index])
        bits = asked.recipe.kept_bits if rank is None else asked.recipe.fixed_bits
        lost = 0.0 if rank is None else float(tails[rank])
        return asked.stored(target, rank, bits, lost, float(tails[0]), forced=target.name in forced)

    def entries(choices: Mapping[str, Choice]) -> list[PlanEntry]:
        return [entry(target, choices[target.name]) for target in asked.targets.targets]

    return Menu(candidates, forced, entries)


def _candidate(asked: Asked, target: Target) -> Candidate:
    recipe, scale = asked.recipe, asked.scale
    storage = Storage(recipe, asked.element, recipe.fixed_bits)
    values = asked.values(target.name)
    numerical = None if values is None else int((values > 0).sum())
    ranks = possible_ranks(target, storage.form(target), recipe.aligned, recipe.min_rank, numerical)
    tails = asked.tails(target.name, min(target.out_features, target.in_features))
    cost = storage.bytes if recipe.in_bytes else storage.numbers
    whole = target.size * scale
    if recipe.in_bytes and recipe.kept_bits is not None:
        whole = dense_integers(target, recipe.kept_bits, recipe.group(recipe.kept_bits)) + asked.element
    return Candidate(
        target.name,
        ranks,
        np.array([cost(target, int(rank)) for rank in ranks], dtype=np.float64),
        tails[ranks] * asked.weight(tails),
        float(whole),
        float(target.size * scale),
        values,
        target.kind,
        asked.evidence.tokens,
        asked.evidence.measured.get(target.name),
    )


def possible_ranks(
    target: Target,
    form: str,
    multiple: int,
    min_rank: int,
    numerical_rank: int | None = None,
) -> NDArray[np.int64]:  # (c,), ascending
    """Return the ranks at which a factored weight stores no more than the dense one; at least one if it can be factored at all.

    In the gauge form a square weight has no full rank: dense stores the same numbers.
    """
    m, n = target.out_features, target.in_features
    whole = m != n and form not in ("rows", "columns")  # a gauge form of a chosen side has no full rank
    largest = (m * n - 1) // (m + n) if form == "plain" else min(m, n) - (0 if whole else 1)
    if numerical_rank is not None:
        largest = min(largest, max(numerical_rank, 1))
    lowest = min(max(min_rank, 1), largest)
    return aligned(np.arange(max(lowest, 1), largest + 1), multiple)


def forced_rank(target: Target, override: Override, form: str) -> int:
    """Return the rank that an override asks for.

    Raises:
        TwofoldError: if the weight has no such rank.
    """
    m, n = target.out_features, target.in_features
    if override.rank is not None:
        if override.rank > min(m, n):
            raise TwofoldError(
                f"the override of {target.name} asks for rank {override.rank}, above its full rank {min(m, n)}"
            )
        return override.rank
    assert override.keep is not None
    numbers = override.keep * target.size
    return int(numbers / (m + n)) if form == "plain" else gauge_rank(m, n, numbers)


def _forced(target: Target, override: Override, candidate: Candidate, storage: Storage) -> Choice:
    """Choose what an override asks for: the largest allowed rank within it, or dense where that stores no more."""
    if override.dense:
        return Choice(None)
    rank = forced_rank(target, override, storage.form(target))
    if storage.numbers(target, rank) >= target.size:
        return Choice(None)
    return at_most(candidate.ranks, max(rank, 1))
