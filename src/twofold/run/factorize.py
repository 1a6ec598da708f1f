"""The work in one call: the plan of a model, and a factored model in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from twofold.allocate import ALLOCATIONS
from twofold.calibrate.opened import Opened
from twofold.checkpoint.plugin import attach
from twofold.errors import TwofoldError
from twofold.factor.prepared import carry_out
from twofold.host.clock import Stopwatch
from twofold.model.load import load_skeleton
from twofold.model.weights import find_targets
from twofold.nn.places import cast_weights
from twofold.objectives import OBJECTIVES
from twofold.planning.plan import Plan
from twofold.recipe import Recipe, make_recipe
from twofold.refine.steps.series import refine
from twofold.run.check import check_methods
from twofold.run.estimate.estimate import estimate_run
from twofold.run.open import given_model, open_for
from twofold.run.prepare import layer_times, plan_of_shapes, prepare, with_structures
from twofold.run.sizing import Sizing
from twofold.scratch.start import factorize_start
from twofold.task.text.windows import fit_window


def plan_model(recipe: Recipe, *, moments_file: Path | None = None, estimate: bool = True, quiet: bool = False) -> Plan:
    """The plan of a recipe, carried out on nothing.

    If the recipe names a calibration, the plan is the one that ``compress`` makes, and the moments are kept for it. If it
    leaves the calibration to its default, no weight is read: the ranks are uniform, a note says so, and the memory and time that
    a run will take are estimated, the time from a probe of some seconds. A quality that is asked for is measured, so it needs
    a named calibration.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
    needs = OBJECTIVES.get(recipe.objective).needs
    ALLOCATIONS.get(recipe.allocate)
    check_methods(recipe)
    if needs and "calibration" not in recipe.model_fields_set and moments_file is None:
        if recipe.bits == "auto":
            raise TwofoldError(
                "`bits=auto` measures what rounding loses: name `calibration=FILE`, or `calibration=self`; or give a number "
                "of bits"
            )
        if recipe.goal is not None:
            raise TwofoldError(
                f"{recipe.goal.setting} needs measuring: name `calibration=FILE`, or `calibration=self`; or give `keep` or `budget`"
            )
        loaded = load_skeleton(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
        recipe = fit_window(recipe, loaded, quiet=True)
        found = find_targets(loaded.model, recipe.include, recipe.exclude)
        found = with_structures(Opened(loaded, named=recipe.task), found, recipe)
        plan = plan_of_shapes(loaded, found, recipe, layer_times(loaded, found, recipe, quiet=quiet))
        note = (
            f"no calibration was named, so no weight was read, no loss is predicted and the ranks are uniform; "
            f"the {recipe.allocate} plan needs the moments: name `calibration=FILE`, or `calibration=self`"
        )
        given, notes = None, [*plan.notes, note]
        try:
            given = estimate_run(Opened(loaded, named=recipe.task), recipe, plan.bytes_after) if estimate else None
        except TwofoldError as error:
            if recipe.memory is not None:
                raise
            notes.append(f"no run on this machine: {error}")  # the plan itself may be for another one
        return plan.model_copy(update={"notes": notes, "estimate": given})
    opened = open_for(recipe, quiet=quiet)
    recipe = fit_window(recipe, opened.loaded, quiet=quiet)
    sizing = _sizing(recipe, opened, quiet=quiet)
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
    opened = open_for(recipe, quiet=quiet) if isinstance(model, str | Path) else given_model(model, tokenizer, recipe)
    loaded = opened.loaded
    if loaded.residence.streamed:
        raise TwofoldError(
            "this model does not fit in memory, so it can't be factorized in place; compress it to a folder: twofold compress"
        )
    recipe = fit_window(recipe, loaded, quiet=quiet)
    watch = Stopwatch()
    sizing = _sizing(recipe, opened, quiet=quiet)
    prepared = prepare(recipe, opened, watch, texts=texts, sizing=sizing, quiet=quiet)
    if sizing is not None:
        sizing.find(prepared)
    replaced = carry_out(prepared, quiet=quiet)
    refine(prepared, replaced, recipe, quiet=quiet)
    result = loaded.model
    cast_weights(result, loaded.stored_dtype)
    attach(result)
    result.twofold_plan, result.twofold_tokenizer = prepared.plan, loaded.tokenizer
    return result


def _sizing(recipe: Recipe, opened: Opened, *, quiet: bool) -> Sizing | None:
    """The search for the size, if a quality is asked for in its place."""
    if recipe.goal is None:
        return None
    measured_on = opened.need_task("measured").measured(opened.loaded, recipe)
    return Sizing(opened, recipe, measured_on, quiet=quiet)
