"""The token windows that a recipe asks for: from texts, files or data sets, or sampled from the model itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twofold.cache import cache_folder
from twofold.calibrate.sample import beginnings, sample_texts
from twofold.calibrate.texts import CHARACTERS_PER_TOKEN, TokenWindows, read_texts, token_windows, tokens_needed
from twofold.errors import TwofoldError
from twofold.files import write_whole
from twofold.models import LoadedModel, check_ids, need_tokenizer, positions
from twofold.progress import say
from twofold.recipe import Recipe

HELD_OUT = 8  # windows set aside to measure on, or to stop a refinement on


def fit_window(recipe: Recipe, loaded: LoadedModel, *, quiet: bool = False) -> Recipe:
    """The recipe with a window that the model has positions for.

    Raises:
        TwofoldError: if the window was given and is too long.
    """
    longest = positions(loaded.model)
    if longest is None or recipe.window <= longest:
        return recipe
    if "window" in recipe.model_fields_set:
        raise TwofoldError(
            f"--window {recipe.window} is longer than this model's {longest} positions; use --window {longest}"
        )
    if not quiet:
        say(f"windows of {longest} tokens: this model has no more positions")
    return recipe.model_copy(update={"window": longest})


def calibration_windows(
    loaded: LoadedModel, recipe: Recipe, hashed: str, texts: Iterable[str] | None = None, *, quiet: bool = False
) -> TokenWindows:
    """The token windows to calibrate on: from texts, files or data sets, or sampled from the model itself."""
    tokenizer = need_tokenizer(loaded)
    held_out = held_out_windows(recipe)
    if texts is not None or recipe.calibration != ["self"]:
        if "self" in recipe.calibration and texts is None:
            raise TwofoldError("'self' can't be mixed with calibration texts; name either")
        source = "given texts" if texts is not None else ", ".join(Path(one).name for one in recipe.calibration)
        needed = tokens_needed(recipe.tokens, held_out * recipe.window) * CHARACTERS_PER_TOKEN
        read = (
            texts
            if texts is not None
            else read_texts(
                recipe.calibration,
                characters=needed,
                tokenizer=tokenizer,
                dataset_config=recipe.dataset_config,
                dataset_split=recipe.dataset_split,
                text_column=recipe.text_column,
            )
        )
        windows = token_windows(
            read, tokenizer, tokens=recipe.tokens, window=recipe.window, held_out=held_out, source=source
        )
        check_ids(torch.cat([windows.ids, windows.held_out]), loaded)
        return windows
    count = max(recipe.tokens // recipe.window, 1)
    begin = beginnings(tokenizer)
    key = hashlib.sha256(f"{hashed} {begin} {recipe.seed} {count} {held_out} {recipe.window}".encode()).hexdigest()[:24]
    path = cache_folder() / "samples" / f"{key}.safetensors"
    ids = _sampled_before(path)
    if ids is None:
        ids = sample_texts(
            loaded.model, begin, sequences=count + held_out, length=recipe.window, seed=recipe.seed, quiet=quiet
        )
        # An even spread of both kinds of beginning over what is calibrated on and what is held out.
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(recipe.seed))]
        _keep_samples(ids, path)
    return TokenWindows(ids[:count], ids[count:], "texts sampled from the model itself", recipe.tokens)


def held_out_windows(recipe: Recipe) -> int:
    """How many windows are set aside: a refinement stops on others than those that the quality is measured on."""
    measured = recipe.eval_windows if recipe.refine and recipe.eval_text is None else 0
    return HELD_OUT + measured


def _sampled_before(path: Path) -> Tensor | None:
    """The samples of an earlier run; None if there are none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            ids: Tensor = file.get_tensor("ids")
            return ids
    except (SafetensorError, OSError):
        return None


def _keep_samples(ids: Tensor, path: Path) -> None:
    """Keep samples for another run; if the disk does not take them, this run goes on without."""
    try:
        write_whole(path, lambda temporary: save_file({"ids": ids.contiguous()}, temporary))
    except TwofoldError as error:
        say(f"the sampled texts are not kept for another run: {error}")
