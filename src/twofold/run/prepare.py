"""The stages one after another: model → targets → moments → spectra → plan → factored model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from twofold.allocate import ALLOCATIONS
from twofold.calibrate.calibrate import calibrate, used_targets
from twofold.calibrate.fingerprint import model_hash, spectra_mark
from twofold.calibrate.moments import Moments
from twofold.calibrate.opened import Opened
from twofold.decompose.decompose import Decomposition, decompose
from twofold.decompose.spectra import Spectra
from twofold.errors import TwofoldError
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
from twofold.model.load import LoadedModel
from twofold.model.source import choose_device, compute_dtype
from twofold.model.streamed import Streamed
from twofold.model.target import Targets
from twofold.model.weights import find_targets
from twofold.objectives import OBJECTIVES
from twofold.planning.bits import stand_in
from twofold.planning.evidence import Evidence, gather
from twofold.planning.make import make_plan
from twofold.planning.plan import Plan
from twofold.quantize.loss import rounding_needs
from twofold.recipe import Recipe
from twofold.run.sizing import Sizing
from twofold.structures.find import find_structures
from twofold.task import Data, on_device

RESIDENT_BLOCKS = 4  # blocks of a model in memory that are decomposed, and kept, together


def prepare(
    recipe: Recipe,
    opened: Opened,
    watch: Stopwatch,
    *,
    texts: Iterable[str] | None = None,
    moments_folder: Path | None = None,
    work: Work | None = None,
    bases: bool = True,
    sizing: Sizing | None = None,
    quiet: bool = False,
) -> Prepared:
    """All stages up to the plan; where a quality is asked for, that is the plan of the whole, before the search.

    Args:
        texts: to calibrate on, in the place of the recipe's.
        moments_folder: where the moments are kept; in the cache, by fingerprint, if it is None.
        work: the unfinished state of the run; what it holds already is used. In memory if it is None.
        bases: whether factors will be made, or only the plan.
        sizing: the search for the size, which measures the dense model before the calibration and may refuse it.
    """
    loaded, model = opened.loaded, opened.loaded.model
    objective, allocation = OBJECTIVES.get(recipe.objective), ALLOCATIONS.get(recipe.allocate)
    measured = allocation.measure is not None
    targets = with_structures(opened, find_targets(model, recipe.include, recipe.exclude), recipe)
    times = layer_times(loaded, targets, recipe, quiet=quiet)
    plan_of_shapes(loaded, targets, recipe, times)  # an impossible budget or override is refused before any work
    if isinstance(loaded.residence, Streamed):
        fused = [target.name for target in targets.targets if loaded.residence.fused(target.name)]
        targets = targets.without(dict.fromkeys(fused, "fused with others in the checkpoint"))
    with watch.stage("hash"):
        hashed = model_hash(model, loaded.shards)
    data: Data | None = None
    moments, reused = None, False
    if objective.needs or recipe.refine or measured or (recipe.goal is not None and recipe.eval_text is None):
        with watch.stage("texts"):
            task, aside = opened.need_task(), recipe.held_out_windows
            data = processes.same(lambda: task.data(loaded, recipe, hashed, texts, held_out=aside, quiet=quiet))
    if sizing is not None:
        with watch.stage("measure"):
            processes.same(partial(sizing.begin, data, hashed))
    if objective.needs:
        assert data is not None
        _announce(data, recipe, quiet=quiet)
        asked = objective.needs | (rounding_needs(objective) if recipe.bits is not None or recipe.kept_bits else set())
        targets, moments, reused = calibrate(
            recipe, opened, targets, asked, data.samples, hashed, watch,
            moments_folder=moments_folder, work=work, quiet=quiet,
        )  # fmt: skip
        targets = used_targets(targets, moments)
    mark = spectra_mark(hashed, moments.fingerprint if moments is not None else "", recipe)
    with watch.stage("decompose"):
        bases = bases or measured or allocation.again or recipe.bits == "auto"
        made = _decomposed(opened, targets, recipe, moments, mark, work, bases=bases, quiet=quiet)
    if measured and work is not None:
        work.update(stage=f"measuring for the allocation {recipe.allocate}")
    measurement = Measurement(model, opened.task, targets.targets, data.samples if data else None, made, recipe, quiet)
    with watch.stage("sensitivities" if measured else "plan"):
        evidence = processes.same(lambda: gather(measurement, recipe.allocate))
    evidence = replace(evidence, times=times.times, times_of=times.times_of)
    element, settings = loaded.stored_dtype.itemsize, recipe.at(1.0)
    with watch.stage("plan"):
        plan = make_plan(loaded.name, targets, made.spectra.values, settings, element, evidence)
    prepared = Prepared(opened, targets, data, reused, made, evidence, plan)
    if allocation.again:
        if work is not None:
            work.update(stage="measuring the moments again")
        with watch.stage("recalibrate"):
            recalibrate(prepared, recipe, folder=None if work is None else work.recalibrated, quiet=quiet)
    return prepared


def _announce(data: Data, recipe: Recipe, *, quiet: bool) -> None:
    """Say where there is less to calibrate on than was asked for."""
    if data.units < data.asked - recipe.window and not quiet:
        say(f"the calibration text gives {data.units:,} tokens of the {data.asked:,} asked for")


def _decomposed(
    opened: Opened,
    targets: Targets,
    recipe: Recipe,
    moments: Moments | None,
    mark: str,
    work: Work | None,
    *,
    bases: bool,
    quiet: bool,
) -> Decomposition:
    """Decompose all targets; what the unfinished state holds already is not decomposed again."""
    folder = None
    if work is not None:
        work.belongs_to(mark)
        work.update(stage="decomposing", targets=len(targets.targets))
        folder = work.spectra
        if not targets.structures:
            check_space(folder, 4 * sum(min(t.out_features, t.in_features) ** 2 for t in targets.targets))
    made = Decomposition(moments, OBJECTIVES.get(recipe.objective), recipe.damping, Spectra(folder, mark, bases=bases))
    chain, blocks = opened.chain or plain_chain(opened.loaded.model), opened.blocks or RESIDENT_BLOCKS
    decompose(opened.loaded.residence, targets, made, chain=chain, blocks=blocks, quiet=quiet)
    return made


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
        run = partial(task.call, model, on_device(task.example(model), model.device))
        with torch.no_grad():
            run()
    return find_structures(model, targets, kinds, run, recipe)


def plan_of_shapes(loaded: LoadedModel, targets: Targets, recipe: Recipe, times: Evidence | None = None) -> Plan:
    """The uniform plan, which needs the shapes alone, and their times where the budget is in time."""
    blind = next(allocation.name for allocation in ALLOCATIONS.all() if allocation.blind)
    uniform = stand_in(recipe.at(1.0)).model_copy(update={"allocate": blind})
    return make_plan(loaded.name, targets, None, uniform, loaded.stored_dtype.itemsize, times)


def layer_times(loaded: LoadedModel, targets: Targets, recipe: Recipe, *, quiet: bool = False) -> Evidence:
    """The measured time of every target, dense and factored, if the budget is in time; what the cache has is not measured again.

    Raises:
        TwofoldError: if weights are cut together, whose layers have no measured time.
    """
    if recipe.latency is None:
        return Evidence()
    if targets.structures:
        raise TwofoldError(
            f"`latency` is for objectives that treat each weight alone, not for {recipe.objective}; give `keep` or `budget`"
        )
    device = loaded.residence.device
    if device.type == "meta":  # no weights are here yet
        device = choose_device(recipe.device)
    dtype = compute_dtype(recipe.dtype, loaded.stored_dtype, device)
    times, words = processes.same(lambda: times_of(targets.targets, recipe.form, dtype, device, quiet=quiet))
    return Evidence(times=times, times_of=words)
