"""A model made ready to be worked on: loaded whole or opened block by block, and what does not go with it refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from twofold.calibrate.opened import Opened
from twofold.checkpoint.ties import settle_ties
from twofold.errors import TwofoldError
from twofold.host.progress import say
from twofold.model.bare import check_bare
from twofold.model.load import LoadedModel, check_finite_weights, load_model, load_streamed
from twofold.model.processor import TOKENS, parts_of
from twofold.model.survey import survey
from twofold.nn.places import cast_weights, stored_dtypes
from twofold.recipe import Recipe
from twofold.refine import REFINEMENTS
from twofold.run.check import check_methods, check_streamed, refuse
from twofold.run.estimate.fit import choose_fit
from twofold.task import Task
from twofold.task.causal_lm import writes_text


def open_for(recipe: Recipe, own: Task | None = None, *, quiet: bool = False) -> Opened:
    """Load a model if it fits in memory, or else open it to be worked through block by block.

    Args:
        own: the task of a caller, in the place of the one that the recipe names.

    Raises:
        TwofoldError: if there is no such model, or not even one of its blocks fits.
    """
    check_methods(recipe)
    fit = choose_fit(recipe)
    if fit is None or fit.chain is None or own is not None:
        how = recipe.model_dump(include={"dtype", "device", "revision", "trust_remote_code", "dequantize"})
        return _in_memory(load_model(recipe.model, **how), recipe, own)
    check_streamed(recipe, fit.resident, fit.limit)
    if not quiet:
        why = f"{fit.limit / 1e9:.1f} GB may be used" if recipe.stream == "auto" else "`stream=always` asks for it"
        say(
            f"worked through {'block by block' if fit.blocks == 1 else f'{fit.blocks} blocks at a time'}, with about "
            f"{fit.streamed / 1e9:.1f} GB: whole in memory it takes {fit.resident / 1e9:.1f} GB, and {why}"
        )
    return _opened(load_streamed(recipe, fit.chain), fit.blocks, recipe)


def open_loaded(model: Any, processor: Any, recipe: Recipe, own: Task | None = None) -> Opened:
    """Take up a model that the caller loaded; on a processor it computes in float32, and is given back in its own dtype.

    Args:
        processor: a tokenizer, an image processor, a feature extractor, or a processor of several.

    Raises:
        TwofoldError: if it is no model, or not a plain one; its weights are not finite, or a setting does not go with it.
    """
    notes = check_bare(model)
    for setting in ("dtype", "device", "revision"):
        if setting in recipe.model_fields_set:
            raise TwofoldError(f"`{setting}` is for models that are named; move a loaded model itself")
    check_finite_weights(model, recipe.model)
    first, dtypes = next(model.parameters()), stored_dtypes(model)
    sizes = Counter[torch.dtype]()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    stored = sizes.most_common(1)[0][0]
    if first.device.type == "cpu" and not {torch.bfloat16, torch.float16}.isdisjoint(dtypes.values()):
        cast_weights(model, torch.float32)
    check_methods(recipe)
    others = {name: dtype for name, dtype in dtypes.items() if dtype != stored}
    parts = parts_of(processor)
    tokenizer = parts.pop(TOKENS, None)
    loaded = LoadedModel(model, tokenizer, recipe.model, None, stored, own_dtypes=others, processors=parts)
    loaded.stored.notes += notes
    return _in_memory(loaded, recipe, own)


def _opened(loaded: LoadedModel, blocks: int | None, recipe: Recipe, own: Task | None = None) -> Opened:
    """Let the configuration of a model say which of its weights are one, before anything is written of it."""
    if (note := settle_ties(loaded.model)) is not None:
        loaded.stored.notes.append(note)
    return Opened(loaded, blocks, recipe.task, own)


def _in_memory(loaded: LoadedModel, recipe: Recipe, own: Task | None = None) -> Opened:
    """Take up a model in memory, and refuse settings that need what it does not give."""
    opened = _opened(loaded, None, recipe, own)
    refuse(recipe, _missing_of(opened, recipe))
    return opened


def _missing_of(opened: Opened, recipe: Recipe) -> dict[str, str]:
    """Find what a model in memory does not give of what the methods need, and why."""
    loaded, task = opened.loaded, opened.task
    name, missing = type(loaded.model).__name__, {}
    if not writes_text(loaded.model):
        missing["next token"] = f"which {name} does not do"
    if task is not None and not task.perplexity:
        missing["next token"] = f"which the task {task.name} is not about"
        missing["perplexity"] = f"which the task {task.name} does not have"
    if not recipe.refine:
        return missing
    try:
        if task is None:
            raise TwofoldError(f"{name} is for no known task")
        with torch.no_grad():
            task.outputs(loaded.model, task.example(loaded.model))
    except TwofoldError as error:
        missing["token logits"] = f"and {error}"
        return missing
    if any("chain" in REFINEMENTS.get(method).needs for method in recipe.refine):
        if not task.streams:
            missing["chain"] = f"which is not done for the task {task.name}"
            return missing
        try:
            if survey(loaded, [], task.example(loaded.model)).chain is None:
                missing["chain"] = f"and {name} is not one block after another"
        except TwofoldError as error:
            missing["chain"] = f"and {error}"
    return missing
