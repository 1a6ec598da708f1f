"""How a plan is made: the choices of every weight, the budget, and what an allocation picks of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from twofold.allocate import ALLOCATIONS, Candidate, cheapest
from twofold.errors import TwofoldError
from twofold.linalg.gauge import plain_storage
from twofold.model.target import Targets
from twofold.model.weights import matches
from twofold.objectives import OBJECTIVES
from twofold.objectives._correction import Correction
from twofold.planning.bits import bit_menu
from twofold.planning.evidence import Evidence
from twofold.planning.menu import Asked, Menu
from twofold.planning.plan import DenseEntry, Plan, PlanEntry
from twofold.planning.ranks import rank_menu
from twofold.planning.settings import Planning
from twofold.planning.sizes import ModelSize, target_budget
from twofold.planning.storage import dense_integers
from twofold.planning.structures import structure_menu
from twofold.planning.time import in_time, time_budget, time_note, timed
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
        spectra: of every target; None for ranks that need no loss (allocate "uniform").
        evidence: what else the allocation looks at.

    Raises:
        TwofoldError: if the budget can't be met, or an override fits no target.
    """
    notes = alone_notes(targets.structures)
    objective, evidence = OBJECTIVES.get(recipe.objective), evidence or Evidence()
    asked = Asked(targets, spectra, recipe, element_bytes, evidence)
    if recipe.corrects:
        entries, dense = _corrected(asked), asked.dense()
    else:
        allocation = ALLOCATIONS.get(recipe.allocate)
        if spectra is None and not allocation.blind:
            raise TwofoldError(f"the allocation {recipe.allocate!r} needs spectra; give a calibration text")
        relative = spectra is not None and allocation.compares and objective.loss != "nats"
        if relative:
            notes.append(
                f"the losses of {recipe.objective} differ in scale from layer to layer, so the global allocation compares "
                "the share of each layer's own total that is left out"
            )
        menu = _menu(Asked(targets, spectra, recipe, element_bytes, evidence, relative))
        candidates = menu.candidates
        if recipe.latency is not None:
            candidates = [in_time(candidate, evidence) for candidate in candidates]
        dense = asked.dense()
        _check_overrides(targets, recipe)
        fixed = sum(menu.forced[c.name].cost(c) for c in candidates if c.name in menu.forced)
        free = [c for c in candidates if c.name not in menu.forced]
        least = fixed + sum(cheapest(c).cost(c) for c in free)
        if recipe.latency is not None:
            amount = time_budget(recipe.latency, candidates, least)
            notes.append(time_note(recipe.latency, candidates, evidence))
        else:
            amount = _amount(asked, least, dense)
        choices = dict(menu.forced)
        if free:
            choices |= {c.name: choice for c, choice in zip(free, allocation(free, amount - fixed), strict=True)}
        entries = menu.entries(choices)
        if recipe.latency is not None:
            entries = _timed(entries, candidates, evidence)
    return Plan(
        model=model_name,
        objective=recipe.objective,
        allocate=recipe.allocate,
        loss_unit=objective.loss,
        element_bytes=element_bytes,
        entries=entries,
        dense=dense,
        notes=notes,
    )


def least_keep(targets: Targets, spectra: Mapping[str, NDArray[np.float64]], recipe: Planning) -> float:
    """Return the smallest share of the factorized weights that the settings allow, rounded up to four digits."""
    menu = _menu(Asked(targets, spectra, recipe.at(1.0), 1))
    least = sum((menu.forced.get(c.name) or cheapest(c)).cost(c) for c in menu.candidates)
    return math.ceil(1e4 * least / targets.target_numbers) / 1e4


def _menu(asked: Asked) -> Menu:
    if asked.recipe.bits == "auto" and asked.evidence.rounding:
        return bit_menu(asked)
    return structure_menu(asked) if asked.targets.structures else rank_menu(asked)


def _check_overrides(targets: Targets, recipe: Planning) -> None:
    """Refuse an override that fits no target."""
    for pattern in recipe.overrides:
        if not any(matches(target.name, [pattern]) for target in targets.targets):
            raise TwofoldError(
                f"the override {pattern!r} matches no weight that is factorized; list them with: twofold inspect"
            )


def _amount(asked: Asked, least: float, dense: list[DenseEntry]) -> float:
    """Return the numbers or bytes that all targets may store.

    Args:
        least: that they can store.
    """
    targets, recipe = asked.targets, asked.recipe
    gauge = recipe.form != "plain" and recipe.bits is None and not targets.structures
    order = sum(max(t.out_features, t.in_features) for t in targets.targets) if gauge else 0
    size = ModelSize(
        targets.target_numbers,
        targets.total_numbers - targets.target_numbers,
        asked.element,
        (least - 4 * order) / asked.scale if recipe.in_bytes else least,
        sum(entry.weight_bytes(asked.element) for entry in dense),
    )
    return target_budget(recipe.keep, recipe.budget, size, order if recipe.in_bytes else 0).amount


def _timed(entries: list[PlanEntry], candidates: list[Candidate], evidence: Evidence) -> list[PlanEntry]:
    """Return entries with their measured times."""
    return [
        entry.model_copy(update=timed(entry.rank, evidence.times[entry.name], candidate))
        for entry, candidate in zip(entries, candidates, strict=True)
    ]


def _corrected(asked: Asked) -> list[PlanEntry]:
    """Return the entries that keep every target whole in integers, with a correction of one rank."""
    recipe, bits = asked.recipe, asked.recipe.fixed_bits
    assert bits is not None
    group, rank_asked = recipe.group(bits), recipe.part(Correction).rank or CORRECTION_RANK
    entries = []
    for target in asked.targets.targets:
        rank = min(rank_asked, target.out_features, target.in_features)
        factors = plain_storage(target.out_features, target.in_features, rank)
        reason = f"{recipe.objective}: the whole weight in {bits} bits, and a correction of rank {rank}"
        entry = asked.entry(target, rank, "corrected", target.size + factors, None, reason)
        size = dense_integers(target, bits, group) + factors * asked.element
        entries.append(entry.model_copy(update={"bits": bits, "scale_group": group, "quantized_bytes": size}))
    return entries
