"""The stages one after another: model → targets → moments → spectra → plan → factored model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from twofold.allocate.base import get_allocation
from twofold.calibrate.calibrate import calibrate, used_targets
from twofold.calibrate.fingerprint import model_hash, spectra_mark
from twofold.calibrate.moments import Moments
from twofold.decompose.decompose import decompose_targets
from twofold.decompose.spectra import Spectra
from twofold.decompose.structures import measure_structures
from twofold.errors import TwofoldError
from twofold.factor.prepared import Prepared
from twofold.factor.recalibrate import recalibrate
from twofold.host import processes
from twofold.host.clock import Stopwatch
from twofold.host.folders import check_space
from twofold.host.progress import say
from twofold.host.unfinished import Work
from twofold.inference.latency import times_of
from twofold.model.blocks import Chain, plain_chain
from twofold.model.load import LoadedModel, Opened
from twofold.model.source import choose_device, compute_dtype
from twofold.model.streamed import Resident, Streamed
from twofold.model.weights import Targets, find_targets
from twofold.objectives.base import Objective, get_objective
from twofold.planning.evidence.base import Evidence
from twofold.planning.evidence.gather import gather
from twofold.planning.make import make_plan
from twofold.planning.plan import Plan
from twofold.quantize.loss import rounding_needs
from twofold.run.check import stand_in
from twofold.run.sizing import Sizing
from twofold.settings.recipe import Recipe
from twofold.structures.find import find_structures
from twofold.task.texts import TokenWindows
from twofold.task.windows import calibration_windows, few_tokens, on_text_alone

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
    loaded, chain = opened.loaded, opened.chain
    model, residence = loaded.model, loaded.residence
    objective = get_objective(recipe.objective)
    targets = with_structures(loaded, find_targets(model, recipe.include, recipe.exclude), recipe)
    measured, again = get_allocation(recipe.allocate).needs, get_allocation(recipe.allocate).again
    times = layer_times(loaded, targets, recipe, quiet=quiet)
    plan_of_shapes(loaded, targets, recipe, times)  # an impossible budget or override is refused before any work
    if objective.needs and getattr(model.config, "is_encoder_decoder", False):
        raise TwofoldError(
            f"{type(model).__name__} is an encoder-decoder model, which can't be calibrated yet; use --objective svd"
        )
    if isinstance(residence, Streamed):
        fused = {t.name: "fused with others in the checkpoint" for t in targets.targets if residence.fused(t.name)}
        targets = targets.without(fused)
    with watch.stage("hash"):
        hashed = model_hash(model, loaded.shards)
    mark = ""
    windows: TokenWindows | None = None
    moments: Moments | None = None
    reused = False
    if objective.needs or recipe.refine or measured or (recipe.goal is not None and recipe.eval_text is None):
        with watch.stage("texts"):
            windows = processes.same(lambda: calibration_windows(loaded, recipe, hashed, texts, quiet=quiet))
    if sizing is not None:
        with watch.stage("measure"):
            processes.same(partial(sizing.begin, windows, hashed))
    if objective.needs:
        assert windows is not None
        with watch.stage("texts"):
            if windows.tokens < windows.asked - recipe.window and not quiet:
                say(f"the calibration text gives {windows.tokens:,} tokens of the {windows.asked:,} asked for")
        asked = objective.needs | (rounding_needs(objective) if recipe.bits is not None or recipe.kept_bits else set())
        targets, moments, reused = calibrate(
            recipe, opened, targets, asked, windows, hashed, watch,
            moments_folder=moments_folder, work=work, quiet=quiet,
        )  # fmt: skip
        mark = moments.fingerprint
        targets = used_targets(targets, moments)
    if work is not None:
        work.belongs_to(spectra_mark(hashed, mark, recipe))
        work.update(stage="decomposing", targets=len(targets.targets))
    with watch.stage("decompose"):
        folder = work.spectra if work is not None else None
        if folder is not None and not targets.structures:
            check_space(folder, 4 * sum(min(t.out_features, t.in_features) ** 2 for t in targets.targets))
        spectra = decompose(
            residence,
            targets,
            moments,
            objective,
            recipe.damping,
            Spectra(
                folder,
                spectra_mark(hashed, mark, recipe),
                bases=bases or bool(measured) or again or recipe.bits == "auto",
            ),
            chain=chain or plain_chain(model),
            blocks=opened.blocks or RESIDENT_BLOCKS,
            quiet=quiet,
        )
    if measured and work is not None:
        work.update(stage=f"measuring for the allocation {recipe.allocate}")
    with watch.stage("sensitivities" if measured else "plan"):
        evidence = processes.same(
            lambda: gather(loaded, recipe, targets.targets, windows, spectra, moments, objective, quiet=quiet)
        )
    evidence = replace(evidence, times=times.times, times_of=times.times_of)
    with watch.stage("plan"):
        plan = make_plan(loaded.name, targets, spectra.values, recipe.at(1.0), loaded.stored_dtype.itemsize, evidence)
    prepared = Prepared(loaded, targets, objective, windows, moments, reused, spectra, evidence, plan)
    if again:
        if work is not None:
            work.update(stage="measuring the moments again")
        with watch.stage("recalibrate"):
            recalibrate(prepared, recipe, folder=None if work is None else work.recalibrated, quiet=quiet)
    return prepared


def with_structures(loaded: LoadedModel, targets: Targets, recipe: Recipe) -> Targets:
    """The targets with those that the objective cuts together, if it does; the model is run to confirm them.

    Raises:
        TwofoldError: if there are none, or the model does not run on text alone.
    """
    model, kinds = loaded.model, get_objective(recipe.objective).structures
    if not kinds:
        return targets
    run = None
    if not any(parameter.is_meta for parameter in model.parameters()):
        run = partial(model, input_ids=few_tokens(model))
        with on_text_alone(model), torch.no_grad():
            run()
    return find_structures(model, targets, kinds, run, recipe.form, recipe.share_blocks, recipe.overrides)


def decompose(
    residence: Resident,
    targets: Targets,
    moments: Moments | None,
    objective: Objective,
    damping: float,
    spectra: Spectra,
    *,
    chain: Chain,
    blocks: int,
    quiet: bool = False,
) -> Spectra:
    """What every rank of every target loses, or every size of those that are cut together."""
    if objective.correct is not None:
        return spectra  # nothing is truncated
    if targets.structures:
        assert moments is not None
        return measure_structures(residence.model, targets.structures, moments, damping, spectra, quiet=quiet)
    return decompose_targets(
        residence, targets.targets, moments, objective, damping, spectra, chain=chain, blocks=blocks, quiet=quiet
    )


def plan_of_shapes(loaded: LoadedModel, targets: Targets, recipe: Recipe, times: Evidence | None = None) -> Plan:
    """The uniform plan, which needs the shapes alone, and their times where the budget is in time."""
    uniform = stand_in(recipe.at(1.0)).model_copy(update={"allocate": "uniform"})
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
            f"--latency is for objectives that treat each weight alone, not for {recipe.objective}; give --keep or --budget"
        )
    device = loaded.residence.device
    if device.type == "meta":  # no weights are here yet
        device = choose_device(recipe.device)
    dtype = compute_dtype(recipe.dtype, loaded.stored_dtype, device)
    times, words = processes.same(lambda: times_of(targets.targets, recipe.form, dtype, device, quiet=quiet))
    return Evidence(times=times, times_of=words)
