"""The stages one after another: model → targets → moments → spectra → plan → factored model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from twofold.allocate import ALLOCATIONS
from twofold.calibrate.calibrate import calibrate, used_targets
from twofold.calibrate.fingerprint import model_hash, spectra_mark
from twofold.calibrate.moments import Moments
from twofold.calibrate.opened import Opened
from twofold.decompose.decompose import Decomposition, decompose_targets
from twofold.decompose.spectra import Spectra
from twofold.evidence.base import Measurement
from twofold.factor.prepared import Prepared
from twofold.factor.recalibrate import recalibrate
from twofold.host import processes
from twofold.host.clock import Stopwatch
from twofold.host.folders import check_space
from twofold.host.progress import say
from twofold.host.unfinished import Work
from twofold.inference.latency import times_of
from twofold.model.blocks import plain_chain
from twofold.model.load import LoadedModel, targets_of
from twofold.model.source import choose_device, compute_dtype
from twofold.model.streamed import Streamed
from twofold.model.target import Targets
from twofold.objectives import OBJECTIVES
from twofold.planning.bits import with_fewest_bits
from twofold.planning.centre import centring_needs, mark_centred
from twofold.planning.evidence import Evidence, gather
from twofold.planning.make import make_plan
from twofold.planning.plan import Plan
from twofold.quantize.loss import rounding_needs
from twofold.recipe import Recipe
from twofold.recipe.effort import effort_words
from twofold.run.sizing import Sizing
from twofold.structures.find import find_structures
from twofold.task import Data, on_device

RESIDENT_BLOCKS = 4  # blocks of a model in memory that are decomposed, and kept, together


def prepare(
    recipe: Recipe,
    opened: Opened,
    watch: Stopwatch,
    *,
    given: Iterable[Any] | None = None,
    moments_folder: Path | None = None,
    work: Work | None = None,
    bases: bool = True,
    sizing: Sizing | None = None,
    quiet: bool = False,
) -> Prepared:
    """Go through all stages up to the plan.

    Args:
        given: to calibrate on, in the place of what the recipe names: texts, or what the task reads.
        moments_folder: where the moments are kept; in the cache, by fingerprint, if it is None.
        work: the unfinished state of the run; what it holds already is used. In memory if it is None.
        bases: whether factors will be made, or only the plan.
        sizing: the search for the size, which may refuse the dense model before the calibration.
    """
    loaded, model, targets = opened.loaded, opened.loaded.model, targets_for(opened, recipe)
    objective, allocation = OBJECTIVES.get(recipe.objective), ALLOCATIONS.get(recipe.allocate)
    measured = allocation.measure is not None
    times = layer_times(loaded, targets, recipe, quiet=quiet)
    plan_of_shapes(loaded, targets, recipe, times)  # an impossible budget or override is refused before any work
    if isinstance(loaded.residence, Streamed):
        fused = [target.name for target in targets.targets if loaded.residence.fused(target.name)]
        targets = targets.without(dict.fromkeys(fused, "fused with others in the checkpoint"))
    with watch.stage("hash"):
        hashed = model_hash(model, loaded.shards)
    data, moments, reused = _data(recipe, opened, hashed, given, watch, quiet=quiet), None, False
    if sizing is not None:
        with watch.stage("measure"):
            processes.same(partial(sizing.begin, data, hashed, work))
    if objective.needs:
        assert data is not None
        needs = objective.needs | centring_needs(recipe, opened.task)
        needs |= rounding_needs(objective) if recipe.bits is not None or recipe.kept_bits else set()
        targets, moments, reused = calibrate(
            recipe, opened, targets, needs, data.samples, hashed, watch,
            moments_folder=moments_folder, work=work, quiet=quiet,
        )  # fmt: skip
        targets = used_targets(targets, moments)
    mark = spectra_mark(hashed, moments.fingerprint if moments is not None else "", recipe, targets)
    with watch.stage("decompose"):
        bases = bases or sizing is not None or measured or allocation.again or recipe.bits == "auto"
        decomposition = decompose_under(opened, targets, recipe, moments, mark, work, bases=bases, quiet=quiet)
    if measured and work is not None:
        work.update(stage=f"measuring for the allocation {recipe.allocate}")
    samples = None if data is None else data.samples
    measurement = Measurement(model, opened.task, targets.targets, samples, decomposition, recipe, quiet)
    with watch.stage("sensitivities" if measured else "plan"):
        gathered = processes.same(lambda: gather(measurement, recipe.allocate))
    evidence = replace(gathered, times=times.times, times_of=times.times_of)
    with watch.stage("plan"):
        element = loaded.stored_dtype.itemsize
        plan = make_plan(loaded.name, targets, decomposition.spectra.values, recipe.at(1.0), element, evidence)
    prepared = Prepared(opened, targets, data, reused, decomposition, evidence, plan)
    if allocation.again:
        if work is not None:
            work.update(stage="measuring the moments again")
        with watch.stage("recalibrate"):
            recalibrate(prepared, recipe, folder=None if work is None else work.folder / "recalibrated", quiet=quiet)
    if sizing is not None:
        with watch.stage("search"):
            processes.same(partial(sizing.find, prepared))
    prepared.plan.prediction = "token" if opened.task is None else opened.task.prediction
    prepared.plan.notes.extend([*loaded.notes, *(data.notes if data is not None else ())])
    return prepared


def _data(
    recipe: Recipe, opened: Opened, hashed: str, given: Iterable[Any] | None, watch: Stopwatch, *, quiet: bool
) -> Data | None:
    """Read the samples of a run, if any stage looks at them; say what its effort is, and if they are fewer than asked for."""
    if recipe.effort is not None and not quiet:
        say(effort_words(recipe, opened.task is None or opened.task.streams))
    needs = OBJECTIVES.get(recipe.objective).needs
    measures = recipe.refine or ALLOCATIONS.get(recipe.allocate).measure is not None
    if not (needs or measures or (recipe.goal is not None and recipe.eval_text is None)):
        return None
    with watch.stage("texts"):
        task = opened.need_task()
        if not (quiet or task.fallback):
            say(f"{type(opened.loaded.model).__name__} is taken for {task.name}; another is named with `task`")
        aside = recipe.held_out_windows if task.streams else recipe.held_out_samples
        data = processes.same(lambda: task.data(opened.loaded, recipe, hashed, given, held_out=aside, quiet=quiet))
    slack = recipe.window if task.streams else 0
    if needs and data.units < data.asked - slack and not quiet:
        what = "text" if task.streams else "data"
        say(f"the calibration {what} gives {data.units:,} {data.samples.unit} of the {data.asked:,} asked for")
    return data


def decompose_under(
    opened: Opened,
    targets: Targets,
    recipe: Recipe,
    moments: Moments | None,
    mark: str,
    work: Work | None = None,
    *,
    bases: bool = True,
    quiet: bool,
) -> Decomposition:
    """Decompose all targets under the objective of a recipe; what the unfinished state holds already is not decomposed again."""
    folder = None
    if work is not None:
        work.belongs_to(mark)
        work.update(stage="decomposing", targets=len(targets.targets))
        folder = work.folder / "spectra"
        if not targets.structures:
            check_space(folder, 4 * sum(min(t.out_features, t.in_features) ** 2 for t in targets.targets))
    spectra = Spectra(folder, mark, bases=bases)
    decomposition = Decomposition(moments, OBJECTIVES.get(recipe.objective), recipe.damping, spectra)
    chain, blocks = opened.chain or plain_chain(opened.loaded.model), opened.blocks or RESIDENT_BLOCKS
    decompose_targets(opened.loaded.residence, targets, decomposition, chain=chain, blocks=blocks, quiet=quiet)
    return decomposition


def targets_for(opened: Opened, recipe: Recipe) -> Targets:
    """Find the targets of a recipe: those whose inputs are centred are marked, and those that are cut together are known."""
    targets = targets_of(opened.loaded, recipe.include, recipe.exclude)
    return with_structures(opened, mark_centred(targets, recipe, opened.task), recipe)


def with_structures(opened: Opened, targets: Targets, recipe: Recipe) -> Targets:
    """Find the targets that the objective cuts together, if it does; the model is run to confirm them.

    Raises:
        TwofoldError: if there are none, or the model does not run.
    """
    model, kinds = opened.loaded.model, OBJECTIVES.get(recipe.objective).structures
    if not kinds:
        return targets
    run = None
    if not any(parameter.is_meta for parameter in model.parameters()):
        task = opened.need_task()
        run = partial(task.call, model, on_device(task.example(model), model.device, model.dtype))
        with torch.no_grad():
            run()
    return find_structures(model, targets, kinds, run, recipe)


def plan_of_shapes(loaded: LoadedModel, targets: Targets, recipe: Recipe, times: Evidence | None = None) -> Plan:
    """Make the uniform plan, which needs the shapes alone, and their times where the budget is in time."""
    blind = next(allocation.name for allocation in ALLOCATIONS.all() if allocation.blind)
    uniform = with_fewest_bits(recipe.at(1.0)).model_copy(update={"allocate": blind})
    return make_plan(loaded.name, targets, None, uniform, loaded.stored_dtype.itemsize, times)


def layer_times(loaded: LoadedModel, targets: Targets, recipe: Recipe, *, quiet: bool = False) -> Evidence:
    """Measure the time of every target, dense and factored, if the budget is in time; the cache is used first."""
    if recipe.latency is None:
        return Evidence()
    device = loaded.residence.device
    if device.type == "meta":  # no weights are here yet
        device = choose_device(recipe.device)
    dtype = compute_dtype(recipe.dtype, loaded.stored_dtype, device)
    times, words = processes.same(lambda: times_of(targets.targets, recipe.form, dtype, device, quiet=quiet))
    return Evidence(times=times, times_of=words)
