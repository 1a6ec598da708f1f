"""A model made ready to be worked on: loaded whole or opened block by block, and what does not go with it refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from twofold.calibrate.opened import Opened
from twofold.errors import TwofoldError
from twofold.host.progress import say
from twofold.model.load import LoadedModel, check_finite, load_model, load_streamed
from twofold.model.survey import survey
from twofold.nn.places import cast_weights
from twofold.recipe import Recipe
from twofold.refine import REFINEMENTS
from twofold.run.check import (
    check_methods,
    check_model,
    check_streamed,
)
from twofold.run.estimate.way import choose_way
from twofold.task.causal_lm import writes_text


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
        opened = Opened(loaded, named=recipe.task)
        check_model(recipe, lacks_of(recipe, opened))
        return opened
    check_streamed(recipe, way.resident)
    if not quiet:
        why = f"{way.limit / 1e9:.1f} GB may be used" if recipe.stream == "auto" else "`stream=always` asks for it"
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
    return Opened(loaded, way.blocks, recipe.task)


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
    opened = Opened(loaded, named=recipe.task)
    check_model(recipe, lacks_of(recipe, opened))
    return opened


def lacks_of(recipe: Recipe, opened: Opened) -> dict[str, str]:
    """Find what a model in memory does not give of what the methods need, and why."""
    loaded, task = opened.loaded, opened.task
    name, lacks = type(loaded.model).__name__, {}
    if not writes_text(loaded.model):
        lacks["next token"] = f"which {name} does not do"
    if not recipe.refine:
        return lacks
    try:
        if task is None:
            raise TwofoldError(f"{name} is for no task that is known")
        with torch.no_grad():
            task.outputs(loaded.model, task.example(loaded.model))
    except TwofoldError as error:
        lacks["token logits"] = f"and {error}"
        return lacks
    needs = {need for one in recipe.refine for need in REFINEMENTS.get(one).needs}
    if "chain" in needs and survey(loaded, [], task.example(loaded.model)).chain is None:
        lacks["chain"] = f"and {name} is not one block after another"
    return lacks
