"""How a plan is made: the choices for every weight, the budget, and what an allocation picks of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twofold.allocate import ALLOCATIONS, Candidate, cheapest, total_cost
from twofold.errors import TwofoldError
from twofold.linalg.gauge import rank_numbers
from twofold.model.target import Targets
from twofold.model.weights import matches
from twofold.objectives import OBJECTIVES
from twofold.objectives._correction import Correction
from twofold.planning.bits import bit_menu
from twofold.planning.centre import centre_notes
from twofold.planning.evidence import Evidence
from twofold.planning.menu import Menu, PlanRequest
from twofold.planning.plan import Plan, PlanEntry, UnusedEntry
from twofold.planning.ranks import rank_menu
from twofold.planning.settings import Planning
from twofold.planning.sizes import ModelSize, target_budget
from twofold.planning.storage import Storage
from twofold.planning.structures import structure_menu
from twofold.planning.time import in_time, time_budget, timed
from twofold.structures.sharing import alone_notes

CORRECTION_RANK = 32  # where none is given


def make_plan(
    model_name: str,
    targets: Targets,
    spectra: Mapping[str, NDArray[np.float64]] | None,  # σ² (k,), largest first
    recipe: Planning,
    element_bytes: int,
    evidence: Evidence | None = None,
) -> Plan:
    """Choose a rank for every target.

    Args:
        spectra: of every target; None for ranks that need no loss, by a blind allocation.
        evidence: what else the allocation looks at.

    Raises:
        TwofoldError: if the budget can't be met, or an override fits no target.
    """
    request = PlanRequest(targets, spectra, recipe, element_bytes, evidence or Evidence())
    entries, notes = (_corrected(request), []) if recipe.corrects else _allocated(request)
    return Plan(
        model=model_name,
        objective=recipe.objective,
        allocate=recipe.allocate,
        loss_unit=OBJECTIVES.get(recipe.objective).loss,
        element_bytes=element_bytes,
        entries=entries,
        dense=request.dense,
        unused=[UnusedEntry(name=t.name, shape=list(t.shape), reason=t.reason) for t in targets.unused],
        notes=centre_notes(targets, recipe) + alone_notes(targets.structures) + notes,
    )


def least_keep(targets: Targets, spectra: Mapping[str, NDArray[np.float64]], recipe: Planning) -> float:
    """Return the smallest share of the factorized weights that the settings allow, rounded up to four digits."""
    menu = _menu(PlanRequest(targets, spectra, recipe.at(1.0), 1))
    least = total_cost(menu.candidates, [menu.forced.get(c.name) or cheapest(c) for c in menu.candidates])
    return math.ceil(1e4 * least / targets.target_numbers) / 1e4


def _menu(request: PlanRequest) -> Menu:
    if request.recipe.bits == "auto" and request.evidence.rounding:
        return bit_menu(request)
    return structure_menu(request) if request.targets.structures else rank_menu(request)


@dataclass(frozen=True)
class Problem:
    """What an allocation decides: the candidates, and what may be spent on those of them that no override has decided."""

    menu: Menu
    candidates: list[Candidate]  # all of them
    free: list[Candidate]
    amount: float  # that may be spent on all
    fixed: float  # of which this much is decided
    notes: list[str]

    @classmethod
    def of(cls, request: PlanRequest) -> Problem:
        """Pose the problem of a request.

        Raises:
            TwofoldError: if the budget can't be met, or an override fits no target.
        """
        targets, recipe, evidence, notes = request.targets, request.recipe, request.evidence, list[str]()
        menu = _menu(request)
        candidates = menu.candidates
        if recipe.latency is not None:
            candidates = [in_time(candidate, evidence) for candidate in candidates]
        for pattern in recipe.overrides:
            if not any(matches(name, [pattern]) for name in request.by_name):
                raise TwofoldError(
                    f"the override {pattern!r} matches no weight that is factorized; list them with: twofold inspect"
                )
        free = [candidate for candidate in candidates if candidate.name not in menu.forced]
        fixed = sum(menu.forced[c.name].cost(c) for c in candidates if c.name in menu.forced)
        least = fixed + total_cost(free, [cheapest(candidate) for candidate in free])
        if recipe.latency is not None:
            amount, note = time_budget(recipe.latency, candidates, least, evidence)
            notes.append(note)
        else:
            numbers, element = targets.target_numbers, request.element
            dense_bytes = sum(entry.weight_bytes(element) for entry in request.dense)
            target_bytes = sum(target.bytes(element) for target in targets.targets)
            size = ModelSize(numbers, targets.total_numbers - numbers, target_bytes, dense_bytes, least)
            amount = target_budget(recipe.keep, recipe.budget, size)
        return cls(menu, candidates, free, amount, fixed, notes)


def _allocated(request: PlanRequest) -> tuple[list[PlanEntry], list[str]]:
    """Return the entries that an allocation chooses within the budget, and notes on what it goes by."""
    recipe, evidence, notes = request.recipe, request.evidence, []
    allocation = ALLOCATIONS.get(recipe.allocate)
    if request.spectra is None and not allocation.blind:
        raise TwofoldError(f"the allocation {recipe.allocate!r} needs spectra; give a calibration text")
    if request.relative:
        notes.append(
            f"the losses of {recipe.objective} differ in scale from layer to layer, so the {recipe.allocate} allocation "
            "compares the share of each layer's own total that is left out"
        )
    problem = Problem.of(request)
    choices = dict(problem.menu.forced)
    if problem.free:
        names = [candidate.name for candidate in problem.free]
        choices |= zip(names, allocation(problem.free, problem.amount - problem.fixed), strict=True)
    entries: dict[str, PlanEntry] = {}
    for candidate in problem.candidates:
        for entry in problem.menu.entries(candidate, choices[candidate.name]):
            entries[entry.name] = entry if recipe.latency is None else timed(entry, candidate, evidence)
    return [entries[name] for name in request.by_name], [*notes, *problem.notes]


def _corrected(request: PlanRequest) -> list[PlanEntry]:
    """Return the entries that keep every target whole in integers, with a correction of one rank."""
    recipe, bits, entries = request.recipe, request.recipe.fixed_bits, []
    assert bits is not None
    storage = Storage(recipe, request.element, bits)
    for target in request.targets.targets:
        rank = min(recipe.part(Correction).rank or CORRECTION_RANK, *target.shape)
        factors = rank_numbers("plain", target, rank)
        reason = f"{recipe.objective}: the whole weight in {bits} bits, and a correction of rank {rank}"
        more = request.rounded(bits, storage.integers(target, None) + factors * request.element)
        entries.append(request.entry(target, rank, "corrected", target.size + factors, None, reason, **more))
    return entries
