"""The token windows that a recipe asks for: from texts, files or data sets, continued by the model, or sampled from it alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.host.progress import say
from twofold.model.load import LoadedModel, check_ids, need_tokenizer, vocabulary_size, window_limit
from twofold.settings.base import Settings
from twofold.task import Data
from twofold.task.text.demo import DEMO
from twofold.task.text.kept import kept_ids
from twofold.task.text.row import Tally
from twofold.task.text.sampled import beginnings, sample_texts
from twofold.task.text.settings import HELD_OUT, Reading, Texts
from twofold.task.text.special import in_words, text_prefix
from twofold.task.text.texts import CHARACTERS_PER_TOKEN, TokenWindows, read_texts, token_windows, tokens_needed

S = TypeVar("S", bound=Settings)
DEMO_WORDS = "the demo's texts, which come with Twofold"
PROMPT = 4  # a continuation goes on from so many-th part of a window of text


def fit_window(recipe: S, loaded: LoadedModel, *, quiet: bool = False) -> S:
    """Return the settings with a window that the model has positions for.

    Raises:
        TwofoldError: if the window was given and is too long, or something was that has no windows.
    """
    if recipe.chosen("samples"):
        raise TwofoldError(
            "`samples` counts clips, images and sentences, and this model reads windows of text; give `tokens`"
        )
    longest, window = window_limit(loaded.model), recipe.part(Texts).window
    if longest is None or window <= longest:
        return recipe
    if "window" in recipe.model_fields_set:
        raise TwofoldError(f"`window={window}` is longer than this model's {longest} positions; use `window={longest}`")
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
    """Return the token windows to calibrate on: from texts, files or data sets, or sampled from the model itself.

    Args:
        texts: to calibrate on, in the place of those that are named.
        held_out: windows to set aside.

    Raises:
        TwofoldError: if the texts are not to be had or too short, or the model can't write any.
    """
    tokenizer, window = need_tokenizer(loaded), recipe.window
    if texts is None and recipe.calibration == ["self"]:
        return _own_windows(loaded, recipe, hashed, held_out, quiet=quiet)
    if texts is None and "self" in recipe.calibration:
        raise TwofoldError("'self' can't be mixed with calibration texts; name either")
    if recipe.self_texts != "both":
        raise TwofoldError(
            f"`self_texts={recipe.self_texts}` says how the model's own texts begin, and there are calibration texts; leave "
            "one of the two out"
        )
    source, tally = "given texts", Tally()
    if texts is None:
        source = ", ".join(DEMO_WORDS if name == DEMO else Path(name).name for name in recipe.calibration)
        if DEMO in recipe.calibration and not quiet:
            say(
                f"calibrating on {DEMO_WORDS}: good for a first look; for use, name texts like yours with `calibration`"
            )
        needed = tokens_needed(recipe.tokens, held_out * window) * CHARACTERS_PER_TOKEN
        how = recipe.model_dump(include={*Reading.model_fields})
        texts = read_texts(recipe.calibration, tokenizer=tokenizer, characters=needed, tally=tally, **how)
    sizes = {"tokens": recipe.tokens, "window": window, "held_out": held_out}
    data = token_windows(texts, tokenizer, **sizes, source=source, bos=recipe.bos)
    tally.tell()
    data = replace(data, notes=tuple(tally.sentences))
    windows, aside = data.samples, data.held_out
    assert isinstance(windows, TokenWindows) and isinstance(aside, TokenWindows)
    check_ids(torch.cat([windows.ids, aside.ids]), loaded)
    if not recipe.continuations:
        return data
    longer = continue_windows(loaded, windows, recipe, hashed, quiet=quiet)
    return replace(data, samples=longer, asked=recipe.tokens + longer.ids.numel() - windows.ids.numel())


def _own_windows(loaded: LoadedModel, recipe: Texts, hashed: str, held_out: int, *, quiet: bool) -> Data:
    """Return windows that are sampled from the model itself."""
    if recipe.continuations:
        raise TwofoldError(
            "`continuations` goes on from calibration texts, and 'self' has none; name some with `calibration`, or give more "
            "`tokens`"
        )
    count, tokenizer = max(recipe.tokens // recipe.window, 1), need_tokenizer(loaded)
    begin = beginnings(tokenizer, recipe.self_texts, vocabulary_size(loaded.model))
    check_ids(torch.tensor([id for ids in begin for id in ids]), loaded)
    prefix = text_prefix(tokenizer)
    cut = len(prefix) if recipe.bos == "none" else 0  # they are sampled after it, and go without
    length = recipe.window + cut
    mark = f"{hashed} {begin} {recipe.seed} {count} {held_out} {length}"
    # Both kinds of beginning are spread evenly over what is calibrated on and what is held out.
    ids = _sampled(mark, loaded, begin, count + held_out, length, recipe.seed, shuffled=True, quiet=quiet)[:, cut:]
    words = "" if cut else in_words(tokenizer, prefix)
    windows = TokenWindows(ids.contiguous(), "texts sampled from the model itself", words)
    return Data(windows[:count], windows[count:], recipe.tokens)


def continue_windows(
    loaded: LoadedModel, windows: TokenWindows, recipe: Texts, hashed: str, *, quiet: bool = False
) -> TokenWindows:
    """Return the windows, and behind them as many as the recipe asks for that the model has written on from pieces of theirs.

    Each begins with a quarter of a window of the text, at a place drawn at random, behind the special tokens that windows begin
    with. The windows take their turns, in an order that is drawn too, so that all are continued equally often.

    Raises:
        TwofoldError: if the model can't generate.
    """
    count = max(recipe.continuations // recipe.window, 1)
    skipped = 0 if recipe.bos == "none" else len(text_prefix(need_tokenizer(loaded)))
    size = max((recipe.window - skipped) // PROMPT, 1)
    generator = torch.Generator().manual_seed(recipe.seed)
    orders = [torch.randperm(len(windows.ids), generator=generator) for _ in range(-(-count // len(windows.ids)))]
    places = torch.randint(skipped, recipe.window - size + 1, (count,), generator=generator).tolist()
    begin = [
        [*windows.ids[row, :skipped].tolist(), *windows.ids[row, place : place + size].tolist()]
        for row, place in zip(torch.cat(orders).tolist(), places, strict=False)
    ]
    mark = f"{hashed} {windows.sha256} {recipe.seed} {count} {size} {recipe.window}"
    ids = _sampled(mark, loaded, begin, count, recipe.window, recipe.seed, shuffled=False, quiet=quiet)
    source = f"{windows.source}, and {ids.numel():,} tokens of its continuations by the model"
    return replace(windows, ids=torch.cat([windows.ids, ids]), source=source)


def _sampled(
    mark: str,
    loaded: LoadedModel,
    begin: list[list[int]],
    count: int,
    length: int,
    seed: int,
    *,
    shuffled: bool,
    quiet: bool,
) -> Tensor:  # (count, length)
    """Return the samples that a mark stands for: those of an earlier run, or new ones, which are kept for another."""

    def sample() -> Tensor:
        ids = sample_texts(loaded.model, begin, sequences=count, length=length, seed=seed, quiet=quiet)
        return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))] if shuffled else ids

    return kept_ids(mark, sample, "the sampled texts")
