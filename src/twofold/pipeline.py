"""The stages one after another: model → targets → moments → spectra → plan → factored model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twofold.allocate import get_allocation
from twofold.calibrate import Moments, TokenWindows, collect_moments, request_statistics
from twofold.calibrate.fingerprint import fingerprint, model_hash, moments_path
from twofold.calibrate.windows import calibration_windows, fit_window
from twofold.checkpoint import attach
from twofold.checkpoint.write import check_space
from twofold.errors import TwofoldError
from twofold.factorize import Spectra, apply_plan, decompose_targets
from twofold.models import LoadedModel, cast_weights, check_finite, first_line, load_model, load_skeleton
from twofold.objectives import Objective, get_objective
from twofold.plan import Plan, make_plan
from twofold.progress import say
from twofold.recipe import Recipe, make_recipe
from twofold.run import Stopwatch
from twofold.targets import Targets, find_groups, find_targets


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
    plan: Plan


def load_for(recipe: Recipe) -> LoadedModel:
    return load_model(
        recipe.model,
        dtype=recipe.dtype,
        device=recipe.device,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )


def prepare(
    recipe: Recipe,
    loaded: LoadedModel,
    watch: Stopwatch,
    *,
    texts: Iterable[str] | None = None,
    moments_file: Path | None = None,
    quiet: bool = False,
) -> Prepared:
    """All stages up to the plan.

    Args:
        texts: to calibrate on, in the place of the recipe's.
        moments_file: where the moments are kept; in the cache, by fingerprint, if it is None.
    """
    model = loaded.model
    objective = get_objective(recipe.objective)
    targets = find_targets(model, recipe.include, recipe.exclude)
    get_allocation(recipe.allocate)
    _plan_of_shapes(loaded, targets, recipe)  # an impossible budget or override is refused before any work
    if objective.needs and getattr(model.config, "is_encoder_decoder", False):
        raise TwofoldError(
            f"{type(model).__name__} is an encoder-decoder model, which can't be calibrated yet; use --objective svd"
        )
    with watch.stage("hash"):
        hashed = model_hash(model)
    windows: TokenWindows | None = None
    moments: Moments | None = None
    reused = False
    if objective.needs:
        with watch.stage("texts"):
            windows = calibration_windows(loaded, recipe, hashed, texts, quiet=quiet)
            if windows.tokens < windows.asked - recipe.window and not quiet:
                say(f"the calibration text gives {windows.tokens:,} tokens of the {windows.asked:,} asked for")
            sample = windows.ids[:1, :16].to(next(model.parameters()).device)
            targets = replace(targets, groups=_groups(model, targets, sample))
        request = request_statistics(targets.targets, targets.groups, objective.needs)
        mark = fingerprint(hashed, windows, request, recipe, next(model.parameters()).dtype)
        path = moments_file or moments_path(mark)
        if path.is_file():
            moments = _reuse(path, mark, named=moments_file is not None)
            reused = moments is not None
        if moments is None:
            check_space(path, 4 * request.numbers)
            about = {"model": loaded.name, "source": windows.source, "seed": str(recipe.seed)}
            with watch.stage("calibrate"):
                moments = collect_moments(
                    model,
                    targets.targets,
                    request,
                    windows.ids,
                    empty=Moments({}, 0, targets.groups, mark, about),
                    seed=recipe.seed,
                    batch_size=recipe.batch_size,
                    partial=path.with_suffix(".partial"),
                    quiet=quiet,
                )
            with watch.stage("save moments"):
                moments.save(path)
        elif not quiet:
            say(f"the moments of an earlier run fit and are used again ({path})")
        targets = targets.without(moments.unused(targets.targets))
        if not targets.targets:
            raise TwofoldError(
                "nothing to factorize: no linear layer takes part when the model runs on the calibration text"
            )
    with watch.stage("decompose"):
        spectra = decompose_targets(model, targets.targets, moments, objective, recipe.damping, quiet=quiet)
    with watch.stage("plan"):
        plan = make_plan(loaded.name, targets, spectra.values, recipe, loaded.stored_dtype.itemsize)
    return Prepared(loaded, targets, objective, windows, moments, reused, spectra, plan)


def _plan_of_shapes(loaded: LoadedModel, targets: Targets, recipe: Recipe) -> Plan:
    """The uniform plan, which needs the shapes alone."""
    uniform = recipe.model_copy(update={"allocate": "uniform"})
    return make_plan(loaded.name, targets, None, uniform, loaded.stored_dtype.itemsize)


def _groups(model: Any, targets: Targets, sample: Tensor) -> dict[str, str]:
    """Which targets share an input, and whether the model runs on token ids at all."""
    try:
        return find_groups(model, targets.targets, lambda: model(input_ids=sample))
    except Exception as error:  # an architecture that needs other inputs fails in its own way
        raise TwofoldError(
            f"{type(model).__name__} does not run on text alone, so it can't be calibrated on it ({first_line(error)}); "
            "--objective svd --allocate uniform needs no calibration"
        ) from error


def _reuse(path: Path, mark: str, *, named: bool) -> Moments | None:
    """The saved moments; those in the cache that are not whole are collected again, those that the user named are refused."""
    try:
        return Moments.load(path, mark)
    except TwofoldError:
        if named:
            raise
        path.unlink(missing_ok=True)
        return None


def plan_model(recipe: Recipe, *, moments_file: Path | None = None, quiet: bool = False) -> Plan:
    """The plan of a recipe, carried out on nothing.

    If the recipe names a calibration, the plan is the one that ``compress`` makes, and the moments are kept for it. If it
    leaves the calibration to its default, no weight is read: the ranks are uniform, and a note says so.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
    needs = get_objective(recipe.objective).needs
    get_allocation(recipe.allocate)
    if needs and "calibration" not in recipe.model_fields_set and moments_file is None:
        loaded = load_skeleton(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
        plan = _plan_of_shapes(loaded, find_targets(loaded.model, recipe.include, recipe.exclude), recipe)
        note = (
            f"no calibration was named, so no weight was read, no loss is predicted and the ranks are uniform; "
            f"the {recipe.allocate} plan needs the moments: name --calibration FILE, or --calibration self"
        )
        return plan.model_copy(update={"notes": [*plan.notes, note]})
    loaded = load_for(recipe)
    recipe = fit_window(recipe, loaded, quiet=quiet)
    return prepare(recipe, loaded, Stopwatch(), moments_file=moments_file, quiet=quiet).plan


def carry_out(prepared: Prepared, recipe: Recipe, watch: Stopwatch, *, quiet: bool = False) -> dict[str, nn.Module]:
    """Factorize the model by its plan; gives the dense modules that were replaced."""
    with watch.stage("factorize"):
        prepared.plan, replaced = apply_plan(
            prepared.loaded.model,
            prepared.plan,
            prepared.spectra,
            prepared.moments,
            prepared.objective,
            recipe.damping,
            prepared.loaded.stored_dtype,
            quiet=quiet,
        )
    return replaced


def factorize(
    model: Any,
    tokenizer: Any = None,
    *,
    texts: Iterable[str] | None = None,
    calibration: str | Path | list[str | Path] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Any:
    """Factorize a model: the main job in one call.

    >>> model = twofold.factorize("smollm2", keep=0.8, calibration="texts.txt")    # doctest: +SKIP
    >>> model.save_pretrained("small")                                             # doctest: +SKIP

    Args:
        model: a folder, a hub id, ``smollm2``, or a loaded transformers model, which is changed in place.
        tokenizer: of a loaded model.
        texts: an iterable of texts to calibrate on.
        calibration: text files or data set names; "self" (the default) samples texts from the model.
        settings: any field of ``twofold.Recipe``: keep or budget, tokens, objective, allocate, seed, …

    Returns:
        The model with ``FactoredLinear`` layers. ``model.twofold_plan`` tells what was done with every weight,
        ``model.twofold_tokenizer`` is the tokenizer that was loaded with it;
        ``save_pretrained``, ``push_to_hub``, ``generate`` and ``dequantize`` work as for any transformers model.

    Raises:
        TwofoldError: for whatever the caller can put right.
    """
    named = model if isinstance(model, str | Path) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if calibration is not None:
        settings["calibration"] = [
            str(c) for c in ([calibration] if isinstance(calibration, str | Path) else calibration)
        ]
    recipe = make_recipe({"model": str(named) or type(model).__name__, **settings})
    loaded = load_for(recipe) if isinstance(model, str | Path) else _given(model, tokenizer, recipe)
    recipe = fit_window(recipe, loaded, quiet=quiet)
    watch = Stopwatch()
    prepared = prepare(recipe, loaded, watch, texts=texts, quiet=quiet)
    carry_out(prepared, recipe, watch, quiet=quiet)
    result = loaded.model
    cast_weights(result, loaded.stored_dtype)
    attach(result)
    result.twofold_plan, result.twofold_tokenizer = prepared.plan, loaded.tokenizer
    return result


def _given(model: Any, tokenizer: Any, recipe: Recipe) -> LoadedModel:
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
    return LoadedModel(model, tokenizer, recipe.model, None, stored)
