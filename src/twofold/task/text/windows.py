"""The token windows that a recipe asks for: from texts, files or data sets, continued by the model, or sampled from it alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.host.cache import cache_folder
from twofold.host.files import write_whole
from twofold.host.progress import say
from twofold.model.load import LoadedModel, check_ids, need_tokenizer, positions
from twofold.task import Data
from twofold.task.text.sampled import beginnings, sample_texts
from twofold.task.text.settings import HELD_OUT, Texts
from twofold.task.text.texts import CHARACTERS_PER_TOKEN, TokenWindows, read_texts, token_windows, tokens_needed

T = TypeVar("T", bound=Texts)
PROMPT = 4  # a continuation goes on from so many-th part of a window of text


def fit_window(recipe: T, loaded: LoadedModel, *, quiet: bool = False) -> T:
    """Return the settings with a window that the model has positions for.

    Raises:
        TwofoldError: if the window was given and is too long.
    """
    longest = positions(loaded.model)
    if longest is None or recipe.window <= longest:
        return recipe
    if "window" in recipe.model_fields_set:
        raise TwofoldError(
            f"`window={recipe.window}` is longer than this model's {longest} positions; use `window={longest}`"
        )
    if not quiet:
        say(f"windows of {longest} tokens: this model has no more positions")
    return recipe.model_copy(update={"window": longest})


def calibration_windows(
    loaded: LoadedModel,
    recipe: Texts,
    hashed: str,
    texts: Iterable[str] | None = None,
    *,
    held_out: int = HELD_OUT,
    quiet: bool = False,
) -> Data:
    """The token windows to calibrate on: from texts, files or data sets, or sampled from the model itself.

    Args:
        texts: to calibrate on, in the place of those that are named.
        held_out: windows to set aside.

    Raises:
        TwofoldError: if the texts are not to be had or too short, or the model can't write any.
    """
    tokenizer = need_tokenizer(loaded)
    if texts is not None or recipe.calibration != ["self"]:
        if "self" in recipe.calibration and texts is None:
            raise TwofoldError("'self' can't be mixed with calibration texts; name either")
        if recipe.self_texts != "both":
            raise TwofoldError(
                f"`self_texts={recipe.self_texts}` says how the model's own texts begin, and there are calibration texts; leave "
                "one of the two out"
            )
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
        data = token_windows(
            read, tokenizer, tokens=recipe.tokens, window=recipe.window, held_out=held_out, source=source
        )
        windows, held = data.samples, data.held_out
        assert isinstance(windows, TokenWindows) and isinstance(held, TokenWindows)
        check_ids(torch.cat([windows.ids, held.ids]), loaded)
        if not recipe.continuations:
            return data
        added = continue_windows(loaded, windows, recipe, hashed, quiet=quiet)
        return Data(added, held, recipe.tokens + added.units(0, len(added)) - windows.units(0, len(windows)))
    if recipe.continuations:
        raise TwofoldError(
            "`continuations` goes on from calibration texts, and 'self' has none; name some with `calibration`, or give more "
            "`tokens`"
        )
    count = max(recipe.tokens // recipe.window, 1)
    begin = beginnings(tokenizer, recipe.self_texts)

    def sample() -> Tensor:
        ids = sample_texts(
            loaded.model, begin, sequences=count + held_out, length=recipe.window, seed=recipe.seed, quiet=quiet
        )
        # An even spread of both kinds of beginning over what is calibrated on and what is held out.
        return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(recipe.seed))]

    ids = _sampled(f"{hashed} {begin} {recipe.seed} {count} {held_out} {recipe.window}", sample)
    source = "texts sampled from the model itself"
    return Data(TokenWindows(ids[:count], source), TokenWindows(ids[count:], source), recipe.tokens)


def continue_windows(
    loaded: LoadedModel, windows: TokenWindows, recipe: Texts, hashed: str, *, quiet: bool = False
) -> TokenWindows:
    """The windows, and behind them as many as the recipe asks for that the model has written on from pieces of theirs.

    Each begins with a quarter of a window of the text, at a place drawn at random. The windows take their turns, in an order that
    is drawn too, so that all are continued equally often.

    Raises:
        TwofoldError: if the model can't generate.
    """
    count = max(recipe.continuations // recipe.window, 1)
    size = max(recipe.window // PROMPT, 1)
    generator = torch.Generator().manual_seed(recipe.seed)
    orders = [torch.randperm(len(windows.ids), generator=generator) for _ in range(-(-count // len(windows.ids)))]
    places = torch.randint(0, recipe.window - size + 1, (count,), generator=generator).tolist()
    begin = [
        windows.ids[row, place : place + size].tolist()
        for row, place in zip(torch.cat(orders).tolist(), places, strict=False)
    ]

    def sample() -> Tensor:
        return sample_texts(loaded.model, begin, sequences=count, length=recipe.window, seed=recipe.seed, quiet=quiet)

    ids = _sampled(f"{hashed} {windows.sha256} {recipe.seed} {count} {size} {recipe.window}", sample)
    source = f"{windows.source}, and {ids.numel():,} tokens of its continuations by the model"
    return TokenWindows(torch.cat([windows.ids, ids]), source)


def _sampled(mark: str, sample: Callable[[], Tensor]) -> Tensor:
    """The samples that a mark stands for: those of an earlier run, or new ones, which are kept for another."""
    path = cache_folder() / "samples" / f"{hashlib.sha256(mark.encode()).hexdigest()[:24]}.safetensors"
    ids = _sampled_before(path)
    if ids is None:
        ids = sample()
        _keep_samples(ids, path)
    return ids


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
