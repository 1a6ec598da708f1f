"""How a plan is made: the choices of every weight, the budget, and what an allocation picks of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from twofold.allocate import ALLOCATIONS, Candidate, Choice, cheapest
from twofold.errors import TwofoldError
from twofold.linalg.gauge import gauge_rank, plain_storage
from twofold.model.settings import Override
from twofold.model.target import DenseWeight, Target, Targets
from twofold.model.weights import last_match, matches
from twofold.nn.int_matrix import int_bytes
from twofold.objectives import OBJECTIVES
from twofold.objectives._correction import Correction
from twofold.planning.bits import Option, bit_candidates
from twofold.planning.evidence import Evidence
from twofold.planning.plan import DenseEntry, Plan, PlanEntry
from twofold.planning.settings import Planning
from twofold.planning.sizes import Budget, ModelSize, target_budget
from twofold.planning.storage import Storage, dense_integers
from twofold.planning.structures import forced_size, sizes_at, structure_candidate
from twofold.planning.time import in_time, time_budget, time_note, timed
from twofold.structures.sharing import alone_notes

CORRECTION_RANK = 32  # where none is given


def possible_ranks(
    target: Target,
    form: str,
    multiple: int,
    min_rank: int,
    numerical_rank: int | None = None,
) -> NDArray[np.int64]:  # (c,), ascending
    """The ranks at which a factored weight stores no more than the dense one; at least one if it can be factored at all.

    In the gauge form a square weight has no full rank: dense stores the same numbers.
    """
    m, n = target.out_features, target.in_features
    whole = m != n and form not in ("rows", "columns")  # a gauge form of a chosen side has no full rank
    largest = (m * n - 1) // (m + n) if form == "plain" else min(m, n) - (0 if whole else 1)
    if numerical_rank is not None:
        largest = min(largest, max(numerical_rank, 1))
    lowest = min(max(min_rank, 1), largest)
    ranks = np.arange(max(lowest, 1), largest + 1)
    aligned = ranks[ranks % multiple == 0]
    return aligned if len(aligned) else ranks[:1]


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
    allocate = recipe.allocate
    if recipe.corrects:
        return _correction_plan(model_name, targets, recipe, element_bytes)
    allocation = ALLOCATIONS.get(allocate)
    if spectra is None and not allocation.blind:
        raise TwofoldError(f"the allocation {allocate!r} needs spectra; give a calibration text")
    unit_loss = OBJECTIVES.get(recipe.objective).loss
    relative = spectra is not None and allocation.compares and unit_loss != "nats"
    if relative:
        notes.append(
            f"the losses of {recipe.objective} differ in scale from layer to layer, so the global allocation compares "
            "the share of each layer's own total that is left out"
        )
    evidence = evidence or Evidence()
    pairs: dict[str, list[Option]] = {}
    if recipe.bits == "auto" and spectra is not None:
        candidates, tails_of, pairs = bit_candidates(targets, spectra, recipe, element_bytes, relative, evidence)
        overrides: dict[str, Choice] = {}
    else:
        options = _structure_options if targets.structures else _options
        candidates, overrides, tails_of = options(targets, spectra, recipe, element_bytes, relative, evidence)
    if recipe.latency is not None:
        candidates = [in_time(candidate, evidence) for candidate in candidates]
    dense = [_dense_entry(one, recipe, element_bytes) for one in targets.dense]
    for pattern in recipe.overrides:
        if not any(matches(target.name, [pattern]) for target in targets.targets):
            raise TwofoldError(
                f"the override {pattern!r} matches no weight that is factorized; list them with: twofold inspect"
            )

    bytes_budget = recipe.in_bytes
    scale = element_bytes if bytes_budget else 1
    fixed = sum(overrides[c.name].cost(c) for c in candidates if c.name in overrides)
    free = [c for c in candidates if c.name not in overrides]
    least = fixed + sum(cheapest(c).cost(c) for c in free)
    gauge = recipe.form != "plain" and recipe.bits is None and not targets.structures
    order = sum(max(t.out_features, t.in_features) for t in targets.targets) if gauge else 0
    size = ModelSize(
        targets.target_numbers,
        targets.total_numbers - targets.target_numbers,
        element_bytes,
        (least - 4 * order) / scale if bytes_budget else least,
        sum(entry.weight_bytes(element_bytes) for entry in dense),
    )
    if recipe.latency is not None:
        amount = time_budget(recipe.latency, candidates, least)
        notes.append(time_note(recipe.latency, candidates, evidence))
    else:
        budget: Budget = target_budget(recipe.keep, recipe.budget, size, order if bytes_budget else 0)
        amount = budget.amount
    choices = dict(overrides)
    if free:
        picked = allocation(free, amount - fixed)
        choices |= {c.name: choice for c, choice in zip(free, picked, strict=True)}
    measured = spectra is not None
    if targets.structures:
        entries = _structure_entries(targets, candidates, choices, tails_of, overrides, recipe, measured)
    else:
        entries = [
            _entry(
                target,
                candidate,
                choices[target.name],
                tails_of[target.name],
                target.name in overrides,
                recipe,
                targets,
                measured,
                element_bytes,
                pairs.get(target.name),
            )
            for target, candidate in zip(targets.targets, candidates, strict=True)
        ]
    if recipe.latency is not None:
        entries = [
            entry.model_copy(update=timed(entry.rank, evidence.times[entry.name], candidate))
            for entry, candidate in zip(entries, candidates, strict=True)
        ]
    return Plan(
        model=model_name,
        objective=recipe.objective,
        allocate=allocate,
        loss_unit=unit_loss,
        element_bytes=element_bytes,
        entries=entries,
        dense=dense,
        notes=notes,
    )


def least_keep(targets: Targets, spectra: Mapping[str, NDArray[np.float64]], recipe: Planning) -> float:
    """The smallest share of the factorized weights that the settings of a recipe allow, rounded up to four digits."""
    options = _structure_options if targets.structures else _options
    candidates, overrides, _ = options(targets, spectra, recipe.at(1.0), 1, False, Evidence())
    least = sum((overrides.get(c.name) or cheapest(c)).cost(c) for c in candidates)
    return math.ceil(1e4 * least / targets.target_numbers) / 1e4


def _options(
    targets: Targets,
    spectra: Mapping[str, NDArray[np.float64]] | None,
    recipe: Planning,
    element_bytes: int,
    relative: bool,
    evidence: Evidence,
) -> tuple[list[Candidate], dict[str, Choice], dict[str, NDArray[np.float64]]]:
    """What may be chosen for every target, what is chosen by an override, and the loss of each rank from 0 on.

    Args:
        relative: whether losses are shares of each target's own total.
    """
    multiple = recipe.aligned
    storage = Storage(recipe, element_bytes, recipe.fixed_bits)
    candidates: list[Candidate] = []
    overrides: dict[str, Choice] = {}
    tails_of: dict[str, NDArray[np.float64]] = {}
    bytes_budget = recipe.in_bytes
    scale = element_bytes if bytes_budget else 1
    for target in targets.targets:
        values = None if spectra is None else np.asarray(spectra[target.name], dtype=np.float64)
        numerical = None if values is None else int((values > 0).sum())
        override = last_match(target.name, recipe.overrides)
        ranks = possible_ranks(target, storage.form(target), multiple, recipe.min_rank, numerical)
        if values is None:
            tails = np.zeros(min(target.out_features, target.in_features) + 1)
        else:
            tails = np.append(np.cumsum(values[::-1])[::-1], 0.0)
        tails_of[target.name] = tails
        weight = 1.0 / tails[0] if relative and tails[0] > 0 else 1.0
        cost = storage.bytes if bytes_budget else storage.numbers
        costs = np.array([cost(target, int(r)) for r in ranks], dtype=np.float64)
        whole = target.size * scale
        if bytes_budget and recipe.kept_bits is not None:
            whole = dense_integers(target, recipe.kept_bits, recipe.group(recipe.kept_bits)) + element_bytes
        candidate = Candidate(
            target.name,
            ranks,
            costs,
            tails[ranks] * weight,
            float(whole),
            float(target.size * scale),
            values,
            target.kind,
            evidence.tokens,
            evidence.measured.get(target.name),
        )
        candidates.append(candidate)
        if override is not None:
            overrides[target.name] = _forced(target, override, candidate, storage)
    return candidates, overrides, tails_of


def _forced(target: Target, override: Override, candidate: Candidate, storage: Storage) -> Choice:
    """The choice that an override asks for: the largest allowed rank within it, or dense where that stores no more."""
    m, n = target.out_features, target.in_features
    if override.dense:
        return Choice(None)
    if override.rank is not None:
        wanted = override.rank
        if wanted > min(m, n):
            raise TwofoldError(f"the override of {target.name} asks for rank {wanted}, above its full rank {min(m, n)}")
    else:
        assert override.keep is not None
        numbers = override.keep * target.size
        wanted = int(numbers / (m + n)) if storage.form(target) == "plain" else gauge_rank(m, n, numbers)
    if storage.numbers(target, wanted) >= target.size:
        return Choice(None)
    return Choice(max(int(np.searchsorted(candidate.ranks, max(wanted, 1), side="right")) - 1, 0))


def _entry(
    target: Target,
    candidate: Candidate,
    choice: Choice,
    tails: NDArray[np.float64],
    forced: bool,
    recipe: Planning,
    targets: Targets,
    measured: bool,
    element: int,
    pairs: list[Option] | None,  # where bits are chosen too
) -> PlanEntry:
    rank, bits, lost = None, recipe.kept_bits, 0.0
    if pairs is not None:
        bits = None
        if choice.index is not None:
            chosen = pairs[choice.index]
            rank, bits, lost = chosen.rank, chosen.bits, chosen.loss
        forced = last_match(target.name, recipe.overrides) is not None
    elif choice.index is not None:
        rank = int(candidate.ranks[choice.index])
        bits, lost = recipe.fixed_bits, float(tails[rank])
    storage = Storage(recipe, element, bits)
    form, numbers = storage.form(target), target.size if rank is None else storage.numbers(target, rank)
    losses = (lost, float(tails[0])) if measured else None
    entry = _written(target, rank, form, numbers, losses, _reason(rank, forced, recipe, bits), targets)
    if bits is None:
        return entry
    group = recipe.group(bits)
    size = dense_integers(target, bits, group) if rank is None else storage.integers(target, rank)
    return entry.model_copy(update={"bits": bits, "scale_group": group, "quantized_bytes": size})


def _correction_plan(model_name: str, targets: Targets, recipe: Planning, element: int) -> Plan:
    """The plan that keeps every target whole in integers, with a correction of one rank."""
    bits = recipe.fixed_bits
    assert bits is not None
    group, asked = recipe.group(bits), recipe.part(Correction).rank or CORRECTION_RANK
    entries = []
    for target in targets.targets:
        rank = min(asked, target.out_features, target.in_features)
        factors = plain_storage(target.out_features, target.in_features, rank)
        reason = f"{recipe.objective}: the whole weight in {bits} bits, and a correction of rank {rank}"
        entry = _written(target, rank, "corrected", target.size + factors, None, reason, targets)
        size = dense_integers(target, bits, group) + factors * element
        entries.append(entry.model_copy(update={"bits": bits, "scale_group": group, "quantized_bytes": size}))
    return Plan(
        model=model_name,
        objective=recipe.objective,
        allocate=recipe.allocate,
        loss_unit=OBJECTIVES.get(recipe.objective).loss,
        element_bytes=element,
        entries=entries,
        dense=[_dense_entry(one, recipe, element) for one in targets.dense],
    )


def _dense_entry(weight: DenseWeight, recipe: Planning, element: int) -> DenseEntry:
    """What is done with a parameter that is no target: nothing, or it is rounded to integers."""
    entry = DenseEntry(name=weight.name, shape=list(weight.shape), numbers=weight.size, reason=weight.reason)
    bits = recipe.rest_bits
    if bits is None or not weight.layer:
        return entry
    rows, columns = reversed(weight.shape) if weight.layer == "transposed" else weight.shape
    group = recipe.group(bits)
    size = int_bytes(rows, columns, bits, group) + element * (1 + len(weight.tied))
    reason = f"{weight.reason}; rounded to {bits} bits"
    return entry.model_copy(update={"bits": bits, "scale_group": group, "quantized_bytes": size, "reason": reason})


def _structure_options(
    targets: Targets,
    spectra: Mapping[str, NDArray[np.float64]] | None,
    recipe: Planning,
    element_bytes: int,
    relative: bool,
    evidence: Evidence,
) -> tuple[list[Candidate], dict[str, Choice], dict[str, NDArray[np.float64]]]:
    """The same as ``_options`` for weights that are cut together: one candidate for each structure, by its name."""
    candidates: list[Candidate] = []
    overrides: dict[str, Choice] = {}
    tails_of: dict[str, NDArray[np.float64]] = {}
    in_bytes = recipe.in_bytes
    for structure in targets.structures:
        length = structure.units * structure.members[-1].per_unit
        values = np.zeros(length) if spectra is None else np.asarray(spectra[structure.name], dtype=np.float64)
        tails = np.append(np.cumsum(values[::-1])[::-1], 0.0)
        weight = structure.layers / tails[0] if relative and tails[0] > 0 else 1.0
        element = element_bytes if in_bytes else 1
        candidate = structure_candidate(targets, structure, tails, recipe, element, in_bytes, weight)
        forced = forced_size(structure, candidate, recipe.overrides)
        candidates.append(candidate)
        tails_of[structure.name] = tails
        if forced is not None:
            overrides[structure.name] = forced
    return candidates, overrides, tails_of


def _structure_entries(
    targets: Targets,
    candidates: list[Candidate],
    choices: dict[str, Choice],
    tails_of: dict[str, NDArray[np.float64]],
    overrides: dict[str, Choice],
    recipe: Planning,
    measured: bool,
) -> list[PlanEntry]:
    """The entries of weights that are cut together, in the order of the targets; the last of a structure has its loss."""
    found: dict[str, PlanEntry] = {}
    for structure, candidate in zip(targets.structures, candidates, strict=True):
        index, tails = choices[structure.name].index, tails_of[structure.name]
        for one in sizes_at(targets, structure, None if index is None else int(candidate.ranks[index])):
            last = one.member.name == structure.name
            lost = float(max(tails[one.kept], 0.0)) if last and one.kept is not None else 0.0
            losses = (lost, float(tails[0]) if last else 0.0) if measured else None
            reason = _reason(one.kept, structure.name in overrides, recipe) + structure.words(last, one.kept is None)
            found[one.target.name] = _written(
                one.target, one.kept, one.member.form, one.numbers, losses, reason, targets, structure.basis
            )
    return [found[target.name] for target in targets.targets]


def _reason(rank: int | None, forced: bool, recipe: Planning, bits: int | None = None) -> str:
    """Why a weight has its rank, or is dense."""
    if recipe.bits == "auto" and bits is not None:
        kept = "at full rank" if rank is None else "by rank and bits"
        return f"an override says so, {bits} bits" if forced else f"{recipe.allocate} allocation {kept}, {bits} bits"
    if rank is not None:
        return "an override says so" if forced else f"{recipe.allocate} allocation"
    if forced:
        return "dense: an override asks for as much"
    if not ALLOCATIONS.get(recipe.allocate).blind:
        return "dense: at this budget every rank that saves numbers would lose more here than elsewhere"
    return "dense: full rank stores as much"


def _written(
    target: Target,
    rank: int | None,
    form: str,
    numbers: int,
    losses: tuple[float, float] | None,  # left out, in all
    reason: str,
    targets: Targets,
    basis: str | None = None,
) -> PlanEntry:
    return PlanEntry(
        name=target.name,
        kind=target.kind,
        layer=target.layer,
        out_features=target.out_features,
        in_features=target.in_features,
        group=targets.groups.get(target.name, target.name),
        rank=rank,
        form=None if rank is None else form,  # type: ignore[arg-type]
        basis=None if rank is None else basis,
        transposed=target.transposed,
        bias=target.bias,
        numbers_before=target.size,
        numbers_after=numbers,
        predicted_loss=None if losses is None else losses[0],
        total_loss=None if losses is None else losses[1],
        reason=reason,
    )
