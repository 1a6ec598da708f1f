"""The stages one after another: model → targets → moments → spectra → plan → factored model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from twofold import distributed
from twofold.allocate import Evidence, get_allocation
from twofold.blocks import Chain, plain_chain
from twofold.calibrate import Moments, TokenWindows
from twofold.calibrate.fingerprint import model_hash
from twofold.calibrate.windows import calibration_windows, fit_window
from twofold.calibration import calibrate, on_text_alone, spectra_mark, used_targets
from twofold.checkpoint import attach
from twofold.checkpoint.write import check_space
from twofold.errors import TwofoldError
from twofold.estimate import Way, choose_way, estimate_run
from twofold.evaluation import evaluation_text
from twofold.evidence import gather
from twofold.models import (
    LoadedModel,
    cast_weights,
    check_finite,
    choose_device,
    compute_dtype,
    load_model,
    load_skeleton,
    load_streamed,
)
from twofold.objectives import Objective, get_objective
from twofold.plan import Plan
from twofold.planning import make_plan
from twofold.progress import say
from twofold.quantize.check import check_bits, stand_in
from twofold.quantize.loss import rounding_needs
from twofold.recalibration import check_recalibrated, recalibrate
from twofold.recipe import Recipe, make_recipe
from twofold.refine import check_refinable, check_refinements, refine
from twofold.residence import Resident, Streamed
from twofold.run import Stopwatch
from twofold.scratch.start import factorize_start
from twofold.sizing import Sizing
from twofold.spectra import Spectra
from twofold.speed.latency import times_of
from twofold.stages import apply_plan, decompose_targets
from twofold.structures import few_tokens, find_structures
from twofold.structures.carry_out import measure_structures
from twofold.structures.options import check_structural
from twofold.targets import Targets, find_targets
from twofold.work import Work

RESIDENT_BLOCKS = 4  # blocks of a model in memory that are decomposed, and kept, together


@dataclass
class Prepared:
    """All that stands before the factors: the model, its targets, moments, spectra and the plan."""

    loaded: LoadedModel
    targets: Targets
    objective: Objective
    windows: TokenWindows | None
    moments: Moments | None
    reused: bool
    spectra: Spectra
    evidence: Evidence
    plan: Plan


@dataclass
class Opened:
    """A model that is ready to be worked on, and how it is: whole in memory, or some blocks at a time."""

    loaded: LoadedModel
    blocks: int | None = None  # in memory at once; None: all

    @property
    def chain(self) -> Chain | None:
        residence = self.loaded.residence
        return residence.chain if isinstance(residence, Streamed) else None


def open_for(recipe: Recipe, *, quiet: bool = False) -> Opened:
    """Load a model if it fits in memory, or else open it to be worked through block by block.

    Raises:
        TwofoldError: if there is no such model, or not even one of its blocks fits.
    """
    check_methods(recipe)
    way = choose_way(recipe)
    if way is None or way.blocks is None:
        loaded = load_model(
            recipe.model,
            dtype=recipe.dtype,
            device=recipe.device,
            revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
        )
        check_refinable(recipe, loaded)
        return Opened(loaded)
    _check_streamed(recipe, way)
    if not quiet:
        why = f"{way.limit / 1e9:.1f} GB may be used" if recipe.stream == "auto" else "--stream always asks for it"
        say(
            f"worked through {'block by block' if way.blocks == 1 else f'{way.blocks} blocks at a time'}, with about "
            f"{way.streamed / 1e9:.1f} GB: whole in memory it takes {way.resident / 1e9:.1f} GB, and {why}"
        )
    loaded = load_streamed(
        recipe.model,
        way.chain,
        dtype=recipe.dtype,
        device=recipe.device,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )
    return Opened(loaded, way.blocks)


def check_methods(recipe: Recipe) -> None:
    """Refuse methods that there are not, or that do not go with one another, whatever the model is.

    Raises:
        TwofoldError: naming the first of them.
    """
    check_refinements(recipe)
    check_bits(recipe, get_objective(recipe.objective))
    check_structural(recipe, bool(get_objective(recipe.objective).structures))
    check_recalibrated(recipe)
    if "perplexities" in get_allocation(recipe.allocate).needs and (
        recipe.latency is not None or recipe.bits is not None
    ):
        raise TwofoldError(
            f"--allocate {recipe.allocate} measures shares of numbers stored as floating point, which a budget in time and "
            "--bits do not count by; use --allocate global"
        )


def _check_streamed(recipe: Recipe, way: Way) -> None:
    """Refuse what needs the whole model in memory, where it is worked through block by block.

    Raises:
        TwofoldError: with the memory that it would take.
    """
    objective = get_objective(recipe.objective)
    if objective.structures:
        raise TwofoldError(
            f"--objective {recipe.objective} works on a model that is whole in memory, and this one is worked through "
            f"block by block; use another objective, or give it {way.resident / 1e9:.1f} GB with --memory"
        )
    if objective.needs and recipe.calibration == ["self"]:
        raise TwofoldError(
            "texts to calibrate on can't be sampled from a model that is worked through block by block (each token would read "
            f"all of its weights); name some with --calibration FILE, or give it {way.resident / 1e9:.1f} GB with --memory"
        )
    if recipe.bits is not None or recipe.kept_bits is not None:
        raise TwofoldError(
            "a model that is worked through block by block can't be rounded to integers yet; leave --bits and --dense-bits out, "
            f"or give it {way.resident / 1e9:.1f} GB with --memory"
        )
    if recipe.refine:
        raise TwofoldError(
            "a model that is worked through block by block can't be refined yet; leave --refine out, or give it "
            f"{way.resident / 1e9:.1f} GB with --memory"
        )
    if get_allocation(recipe.allocate).needs or get_allocation(recipe.allocate).again:
        raise TwofoldError(
            f"--allocate {recipe.allocate} measures the whole model, and this one is worked through block by block; use "
            f"--allocate global, or give {way.resident / 1e9:.1f} GB with --memory"
        )
    if recipe.goal is not None:
        raise TwofoldError(
            f"{recipe.goal.flag} is searched for on the whole model, and this one is worked through block by block; give "
            f"--keep or --budget, or {way.resident / 1e9:.1f} GB with --memory"
        )


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
            windows = distributed.same(lambda: calibration_windows(loaded, recipe, hashed, texts, quiet=quiet))
    if sizing is not None:
        with watch.stage("measure"):
            distributed.same(partial(sizing.begin, windows, hashed))
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
        evidence = distributed.same(
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
    return distributed.same(lambda: times_of(targets.targets, recipe.form, dtype, device, quiet=quiet))


def plan_model(recipe: Recipe, *, moments_file: Path | None = None, estimate: bool = True, quiet: bool = False) -> Plan:
    """The plan of a recipe, carried out on nothing.

    If the recipe names a calibration, the plan is the one that ``compress`` makes, and the moments are kept for it. If it
    leaves the calibration to its default, no weight is read: the ranks are uniform, a note says so, and the memory and time that
    a run will take are estimated, the time from a probe of some seconds. A quality that is asked for is measured, so it needs
    a named calibration.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
    needs = get_objective(recipe.objective).needs
    get_allocation(recipe.allocate)
    check_methods(recipe)
    if needs and "calibration" not in recipe.model_fields_set and moments_file is None:
        if recipe.bits == "auto":
            raise TwofoldError(
                "--bits auto measures what rounding loses: name --calibration FILE, or --calibration self; or give a number "
                "of bits"
            )
        if recipe.goal is not None:
            raise TwofoldError(
                f"{recipe.goal.flag} needs measuring: name --calibration FILE, or --calibration self; or give --keep or --budget"
            )
        loaded = load_skeleton(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
        recipe = fit_window(recipe, loaded, quiet=True)
        found = find_targets(loaded.model, recipe.include, recipe.exclude)
        found = with_structures(loaded, found, recipe)
        plan = plan_of_shapes(loaded, found, recipe, layer_times(loaded, found, recipe, quiet=quiet))
        note = (
            f"no calibration was named, so no weight was read, no loss is predicted and the ranks are uniform; "
            f"the {recipe.allocate} plan needs the moments: name --calibration FILE, or --calibration self"
        )
        given, notes = None, [*plan.notes, note]
        try:
            given = estimate_run(loaded, recipe, plan.bytes_after) if estimate else None
        except TwofoldError as error:
            if recipe.memory is not None:
                raise
            notes.append(f"no run on this machine: {error}")  # the plan itself may be for another one
        return plan.model_copy(update={"notes": notes, "estimate": given})
    opened = open_for(recipe, quiet=quiet)
    recipe = fit_window(recipe, opened.loaded, quiet=quiet)
    sizing = _sizing(recipe, opened.loaded, quiet=quiet)
    prepared = prepare(
        recipe,
        opened,
        Stopwatch(),
        moments_folder=moments_file,
        bases=sizing is not None,
        sizing=sizing,
        quiet=quiet,
    )
    if sizing is not None:
        sizing.find(prepared)
    return prepared.plan


def _sizing(recipe: Recipe, loaded: LoadedModel, *, quiet: bool) -> Sizing | None:
    """The search for the size, if a quality is asked for in its place."""
    if recipe.goal is None:
        return None
    return Sizing(loaded, recipe, evaluation_text(loaded, recipe), quiet=quiet)


def carry_out(prepared: Prepared, recipe: Recipe, *, quiet: bool = False) -> dict[str, nn.Module]:
    """Factorize a model in memory by its plan; gives the dense modules that were replaced."""
    prepared.plan, replaced = apply_plan(
        prepared.loaded.model,
        prepared.plan,
        prepared.spectra,
        prepared.moments,
        prepared.objective,
        recipe.damping,
        prepared.loaded.stored_dtype,
        structures=prepared.targets.structures,
        quiet=quiet,
    )
    return replaced


def factorize(
    model: Any,
    tokenizer: Any = None,
    *,
    init: str | None = None,
    texts: Iterable[str] | None = None,
    calibration: str | Path | list[str | Path] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Any:
    """Factorize a model: the main job in one call, or the start of a training from scratch.

    >>> model = twofold.factorize("smollm2", keep=0.8, calibration="texts.txt")    # doctest: +SKIP
    >>> model.save_pretrained("small")                                             # doctest: +SKIP
    >>> model = twofold.factorize(LlamaConfig(), init="spectral", keep=0.5)        # doctest: +SKIP

    Args:
        model: a folder, a hub id, ``smollm2``, or a loaded transformers model, which is changed in place; or a configuration,
            of which a model with random weights is built.
        tokenizer: of a loaded model.
        init: for a training from scratch, where nothing is calibrated: "spectral" (for a configuration the default) truncates
            the weights that the model has, "random" draws factors whose product is as large (docs/train.md).
        texts: an iterable of texts to calibrate on.
        calibration: text files or data set names; "self" (the default) samples texts from the model.
        settings: any field of ``twofold.Recipe``: one of keep, budget, perplexity_at_most and kl_at_most; tokens, objective,
            allocate, seed, …

    Returns:
        The model with ``FactoredLinear`` layers. ``model.twofold_plan`` tells what was done with every weight,
        ``model.twofold_tokenizer`` is the tokenizer that was loaded with it;
        ``save_pretrained``, ``push_to_hub``, ``generate`` and ``dequantize`` work as for any transformers model.

    Raises:
        TwofoldError: for whatever the caller can put right.
    """
    if init is not None or isinstance(model, PretrainedConfig):
        if texts is not None or calibration is not None:
            raise TwofoldError("a start for a training from scratch is not calibrated; leave texts and calibration out")
        return factorize_start(model, init or "spectral", **settings)
    named = model if isinstance(model, str | Path) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if calibration is not None:
        settings["calibration"] = [
            str(c) for c in ([calibration] if isinstance(calibration, str | Path) else calibration)
        ]
    recipe = make_recipe({"model": str(named) or type(model).__name__, **settings})
    opened = open_for(recipe, quiet=quiet) if isinstance(model, str | Path) else _given(model, tokenizer, recipe)
    loaded = opened.loaded
    if loaded.residence.streamed:
        raise TwofoldError(
            "this model does not fit in memory, so it can't be factorized in place; compress it to a folder: twofold compress"
        )
    recipe = fit_window(recipe, loaded, quiet=quiet)
    watch = Stopwatch()
    sizing = _sizing(recipe, loaded, quiet=quiet)
    prepared = prepare(recipe, opened, watch, texts=texts, sizing=sizing, quiet=quiet)
    if sizing is not None:
        sizing.find(prepared)
    replaced = carry_out(prepared, recipe, quiet=quiet)
    refine(prepared, replaced, recipe, quiet=quiet)
    result = loaded.model
    cast_weights(result, loaded.stored_dtype)
    attach(result)
    result.twofold_plan, result.twofold_tokenizer = prepared.plan, loaded.tokenizer
    return result


def _given(model: Any, tokenizer: Any, recipe: Recipe) -> Opened:
    """A model that the caller loaded; on a processor it is computed with in float32, and given back in its own dtype."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TwofoldError(f"factorize takes a transformers model or its name, got {type(model).__name__}")
    for setting in ("dtype", "device", "revision"):
        if setting in recipe.model_fields_set:
            raise TwofoldError(f"{setting} is for models that are named; move a loaded model itself")
    check_finite(model, recipe.model)
    first = next(model.parameters())
    stored = first.dtype
    if first.device.type == "cpu" and stored in (torch.bfloat16, torch.float16):
        cast_weights(model, torch.float32)
    loaded = LoadedModel(model, tokenizer, recipe.model, None, stored)
    check_methods(recipe)
    check_refinable(recipe, loaded)
    return Opened(loaded)
