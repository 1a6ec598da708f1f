"""The stages of a factorization, each from values to a value: spectra of moments, factored layers of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from twofold.calibrate import Moments
from twofold.decompose.spectra import Spectra
from twofold.errors import TwofoldError
from twofold.factor.corrected import corrected_layer
from twofold.factor.integers import integer_dense, integer_layer, round_rest
from twofold.factor.structures import cut_entries
from twofold.host import processes
from twofold.host.progress import Tick, progress
from twofold.linalg import KnownRoots, Spectrum, decompose, truncate, truncation_loss, working_dtype
from twofold.model.blocks import Chain, stretches
from twofold.model.streamed import Resident
from twofold.model.weights import Target, dense_weight, replace_module
from twofold.nn import CompactLinear, FactoredLinear, QuantizedLinear
from twofold.nn.shared_linear import hold_bases
from twofold.objectives import LayerMoments, Objective, Problem
from twofold.planning.plan import Plan, PlanEntry
from twofold.planning.storage import rank_numbers
from twofold.quantize.loss import far_diagonal
from twofold.structures import Structure

BATCH = 4  # weights of one shape that are decomposed together, as long as they are small
BATCH_NUMBERS = 4 * 1024**2  # k² of all together


def layer_problem(
    model: nn.Module, target: Target, moments: Moments | None, objective: Objective, damping: float
) -> Problem:
    """The metric and the Gram matrix of one target under an objective."""
    weight = dense_weight(model.get_submodule(target.name)).detach()
    weight = weight.to(working_dtype(weight.device))
    layer = moments.layer(target.name) if moments is not None else LayerMoments()
    assert objective.build is not None  # those without cut structures
    return objective.build(weight, layer, damping)


def work_units(targets: list[Target], chain: Chain | None, blocks: int) -> list[tuple[str, list[str], list[Target]]]:
    """Which targets are worked on together: a name, the blocks that they stand in, and the targets.

    Args:
        blocks: how many blocks may be in memory at once.
    """
    if chain is None:
        return [("whole", [], list(targets))]
    outside = [target for target in targets if chain.block_of(target.name) is None]
    units: list[tuple[str, list[str], list[Target]]] = [("outside", [], outside)] if outside else []
    for part in stretches(chain, blocks):
        inside = [
            t for t in targets if part.first <= (i if (i := chain.block_of(t.name)) is not None else -1) < part.last
        ]
        if inside:
            units.append((f"{part.first:04d}-{part.last:04d}", list(chain.blocks[part.first : part.last]), inside))
    return units


def decompose_targets(
    residence: Resident,
    targets: list[Target],
    moments: Moments | None,
    objective: Objective,
    damping: float,
    spectra: Spectra,
    *,
    chain: Chain | None = None,
    blocks: int = 1,
    quiet: bool = False,
) -> Spectra:
    """Decompose every target once, for every rank; what the spectra hold already is not done again.

    Many processes share the work, if the spectra have a folder.

    Raises:
        TwofoldError: naming the layer whose weight or moments are not finite.
    """
    residence.keep_apart()
    summed_low = moments is not None and residence.dtype != torch.float64
    eps = torch.finfo(torch.float32).eps if summed_low else None
    units = work_units(targets, chain, blocks)
    mine = units[processes.rank() :: processes.world()] if spectra.folder is not None else units
    missing = [(name, held, spectra.lacks(inside)) for name, held, inside in mine]
    total = sum(len(inside) for _, _, inside in mine)
    done = total - sum(len(inside) for _, _, inside in missing)
    with progress("Decomposing", total, done=done, unit="weights", quiet=quiet) as tick:
        for name, held, inside in missing:
            if inside:
                with residence.hold(held):
                    spectra.add(name, _decompose(residence.model, inside, moments, objective, damping, eps, tick))
    processes.wait()
    if processes.world() > 1:
        spectra.refresh()
    return spectra


def _decompose(
    model: nn.Module,
    targets: list[Target],
    moments: Moments | None,
    objective: Objective,
    damping: float,
    eps: float | None,
    tick: Tick,
) -> dict[str, Spectrum]:
    """Decompose weights that are in memory, those of one shape together."""
    found: dict[str, Spectrum] = {}
    shapes: dict[tuple[int, int], list[Target]] = {}
    for target in targets:
        shapes.setdefault((target.out_features, target.in_features), []).append(target)
    known = KnownRoots()
    for shape, same in shapes.items():
        together = max(1, min(BATCH, BATCH_NUMBERS // min(shape) ** 2))
        for begin in range(0, len(same), together):
            batch = same[begin : begin + together]
            problems = [layer_problem(model, target, moments, objective, damping) for target in batch]
            for target, problem in zip(batch, problems, strict=True):
                if not torch.isfinite(problem.gram).all():
                    raise TwofoldError(f"the weight or the moments of {target.name} hold NaN or infinity")
            metrics = [p.metric for p in problems if p.metric is not None]
            grams = torch.stack([p.gram for p in problems])
            side = problems[0].side
            del problems
            stacked = decompose(torch.stack(metrics) if metrics else None, grams, side, eps, known)
            for i, target in enumerate(batch):
                one = stacked[i]
                found[target.name] = replace(one, basis=one.basis.to(torch.float32, copy=True))
                tick()
    return found


def factor_layer(
    weight: torch.Tensor,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
    entry: PlanEntry,
    spectrum: Spectrum,
    problem: Problem,
    stored_dtype: torch.dtype,
) -> tuple[FactoredLinear, PlanEntry, str | None]:
    """The factored layer of one plan entry, the entry as it was carried out, and a note if the gauge form had to give way.

    The numbers are rounded to the dtype that will be stored, and computed with in the dtype of the weight.
    """
    assert entry.rank is not None
    left, right = truncate(weight, spectrum, problem.metric, entry.rank)
    form: Literal["auto", "plain"] = "plain" if entry.form == "plain" else "auto"
    layer = FactoredLinear.from_factors(left, right, bias, form, entry.transposed, dtype=stored_dtype)
    update: dict[str, Any] = {}
    note = None
    if form == "auto" and layer.form == "plain":
        # The same storage in plain factors takes a smaller rank.
        rank = max(entry.numbers_after // (entry.out_features + entry.in_features), 1)
        left, right = truncate(weight, spectrum, problem.metric, rank)
        layer = FactoredLinear.from_factors(left, right, bias, "plain", entry.transposed, dtype=stored_dtype)
        note = (
            f"{entry.name}: no bounded gauge form, so plain factors of rank {rank} take the place of rank {entry.rank}"
        )
        update = {
            "rank": rank,
            "numbers_after": rank_numbers("plain", entry, rank),
            "predicted_loss": float(spectrum.tails[rank]),
            "reason": f"{entry.reason}; plain factors, since the gauge form had no bounded coefficients",
        }
    layer = layer.to(weight.dtype)
    product = layer.to_dense(spectrum.values.dtype)
    measured = truncation_loss(weight, product, problem.metric, problem.gram)
    return layer, entry.model_copy(update={"form": layer.form, "measured_loss": measured, **update}), note


def target_of(entry: PlanEntry) -> Target:
    """The target that an entry of a plan is about."""
    return Target(entry.name, entry.out_features, entry.in_features, entry.bias, entry.transposed)


def factor_entries(
    model: nn.Module,
    entries: list[PlanEntry],
    spectra: Spectra,
    moments: Moments | None,
    objective: Objective,
    damping: float,
    stored_dtype: torch.dtype,
    tick: Tick,
) -> Iterator[tuple[PlanEntry, FactoredLinear | QuantizedLinear | None, str | None]]:
    """Factor weights that are in memory, or round them, one after another."""
    for entry in entries:
        if not entry.replaced:
            yield entry, None, None
        elif objective.correct is not None:
            module = model.get_submodule(entry.name)
            corrected, entry = corrected_layer(
                dense_weight(module),
                getattr(module, "bias", None),
                entry,
                objective.correct,
                moments.layer(entry.name) if moments is not None else LayerMoments(),
                damping,
                stored_dtype,
            )
            corrected.requires_grad_(any(p.requires_grad for p in module.parameters()))
            yield entry, corrected, None
        else:
            module = model.get_submodule(entry.name)
            target = target_of(entry)
            problem = layer_problem(model, target, moments, objective, damping)
            spectrum = spectra.get(target, problem.gram.dtype, problem.gram.device)
            weight = dense_weight(module).detach()
            bias = getattr(module, "bias", None)
            layer: FactoredLinear | QuantizedLinear
            note = None
            if entry.bits is None:
                layer, done, note = factor_layer(weight, bias, entry, spectrum, problem, stored_dtype)
            else:
                sides = moments.layer(entry.name) if moments is not None else LayerMoments()
                far = far_diagonal(weight.to(problem.gram.dtype), sides, objective, damping)
                if entry.rank is None:
                    layer, done = integer_dense(weight, bias, entry, problem, far, stored_dtype)
                else:
                    layer, done, note = integer_layer(weight, bias, entry, spectrum, problem, far, stored_dtype)
            layer.requires_grad_(any(p.requires_grad for p in module.parameters()))
            yield done, layer, note
        tick()


def apply_plan(
    model: nn.Module,
    plan: Plan,
    spectra: Spectra,
    moments: Moments | None,
    objective: Objective,
    damping: float,
    stored_dtype: torch.dtype,
    *,
    structures: Sequence[Structure] = (),
    quiet: bool = False,
) -> tuple[Plan, dict[str, nn.Module]]:
    """Put the factored layers in the place of the dense ones of a model that is in memory.

    Args:
        structures: the weights that are cut together, if the plan is of such.

    Returns:
        The plan as it was carried out (forms, measured losses, notes), and the dense modules that were replaced.
    """
    done: dict[str, PlanEntry] = {}
    notes = list(plan.notes)
    replaced: dict[str, nn.Module] = {}
    with progress("Factorizing", len(plan.entries), unit="weights", quiet=quiet) as tick:
        made: Iterable[tuple[PlanEntry, CompactLinear | None, str | None]]
        if structures:
            assert moments is not None
            made = cut_entries(model, plan.entries, structures, moments, damping, stored_dtype, tick)
        else:
            made = factor_entries(model, plan.entries, spectra, moments, objective, damping, stored_dtype, tick)
        for entry, layer, note in made:
            done[entry.name] = entry
            notes += [note] if note is not None else []
            if layer is not None:
                replaced[entry.name] = replace_module(model, entry.name, layer)
    hold_bases(model)
    replaced |= round_rest(model, plan, stored_dtype)
    entries = [done[entry.name] for entry in plan.entries]
    return plan.model_copy(update={"entries": entries, "notes": notes}), replaced


@contextmanager
def put_back(model: nn.Module, names: list[str]) -> Iterator[None]:
    """After the block the model has the same modules again at these places, however the block ends."""
    before = {name: model.get_submodule(name) for name in names}
    try:
        yield
    finally:
        for name, module in before.items():
            if model.get_submodule(name) is not module:
                replace_module(model, name, module)
        hold_bases(model)


@contextmanager
def dense_again(model: nn.Module, replaced: dict[str, nn.Module]) -> Iterator[None]:
    """Within the block the model has its dense layers back, with no copy made."""
    factored = {name: replace_module(model, name, module) for name, module in replaced.items()}
    try:
        yield
    finally:
        for name, module in factored.items():
            replace_module(model, name, module)
