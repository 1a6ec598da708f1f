"""The ranks that a weight may have by itself."""

from __future__ import annotations

import numpy as np

from twofold.allocate import Candidate, Choice
from twofold.errors import TwofoldError
from twofold.linalg.gauge import gauge_rank
from twofold.model.settings import Override
from twofold.model.target import Target
from twofold.model.weights import last_match
from twofold.planning.menu import Menu, PlanRequest, at_most
from twofold.planning.plan import PlanEntry
from twofold.planning.storage import Storage


def rank_menu(request: PlanRequest) -> Menu:
    """Return what may be chosen for every target."""
    recipe = request.recipe
    storage = Storage(recipe, request.element, recipe.fixed_bits)
    candidates = [_candidate(request, target, storage) for target in request.targets.targets]
    forced = {
        candidate.name: _forced(request.by_name[candidate.name], override, candidate, storage)
        for candidate in candidates
        if (override := last_match(candidate.name, recipe.overrides)) is not None
    }

    def entries(candidate: Candidate, choice: Choice) -> list[PlanEntry]:
        target, rank = request.by_name[candidate.name], choice.rank(candidate)
        tails = request.tails(target.name, min(target.shape))
        bits = recipe.kept_bits if rank is None else recipe.fixed_bits
        losses = (0.0 if rank is None else float(tails[rank]), float(tails[0]))
        return [request.stored(target, rank, bits, losses, forced=target.name in forced)]

    return Menu(candidates, forced, entries)


def _candidate(request: PlanRequest, target: Target, storage: Storage) -> Candidate:
    values = request.values(target.name)
    ranks = request.ranks(_largest(target, storage.form(target), values))
    tails = request.tails(target.name, min(target.shape))
    return Candidate(
        target.name,
        ranks,
        np.array([storage.cost(target, int(rank)) for rank in ranks], dtype=np.float64),
        tails[ranks] * request.weight(tails),
        float(Storage(request.recipe, request.element, request.recipe.kept_bits).cost(target, None)),
        float(target.bytes(request.element) if request.recipe.in_bytes else target.size),
        values,
        target.alike,
        request.evidence.tokens,
        request.evidence.measured.get(target.name),
    )


def _largest(target: Target, form: str, values: np.ndarray | None) -> int:
    """Return the largest rank at which a factored weight stores no more than the dense one, within the numerical rank.

    In the gauge form a square weight has no full rank: dense stores the same numbers.
    """
    m, n = target.out_features, target.in_features
    whole = m != n and form not in ("rows", "columns")  # a gauge form of a chosen side has no full rank
    largest = (m * n - 1) // (m + n) if form == "plain" else min(m, n) - (0 if whole else 1)
    return largest if values is None else min(largest, max(int((values > 0).sum()), 1))


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
    return Choice(None) if storage.numbers(target, rank) >= target.size else at_most(candidate.ranks, max(rank, 1))
