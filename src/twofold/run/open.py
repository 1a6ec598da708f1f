"""A model made ready to be worked on: loaded whole or opened block by block, and what does not go with it refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from twofold.allocate import get_allocation
from twofold.errors import TwofoldError
from twofold.factor.recalibrate import check_recalibrated
from twofold.host.progress import say
from twofold.model.blocks import Chain
from twofold.model.load import LoadedModel, cast_weights, check_finite, load_model, load_streamed
from twofold.model.streamed import Streamed
from twofold.objectives import get_objective
from twofold.planning.structures import check_structural
from twofold.refine import check_refinable, check_refinements
from twofold.run.check import check_bits
from twofold.run.estimate.memory import Way, choose_way
from twofold.settings.recipe import Recipe


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


def given_model(model: Any, tokenizer: Any, recipe: Recipe) -> Opened:
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
    if objective.needs and (recipe.calibration == ["self"] or recipe.continuations):
        put_right = (
            "name some with --calibration FILE" if recipe.calibration == ["self"] else "leave --continuations out"
        )
        raise TwofoldError(
            "texts to calibrate on can't be sampled from a model that is worked through block by block (each token would read "
            f"all of its weights); {put_right}, or give it {way.resident / 1e9:.1f} GB with --memory"
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
