"""Texts from files, a datasets name or a Python iterable, cut into windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.task import Batch, Data, Samples
from twofold.task.text.chat import CALLS, RefusedRowError, has_template, no_template, show
from twofold.task.text.row import Row, Tally
from twofold.task.text.rows import no_rows, rows_of
from twofold.task.text.sources import Sources
from twofold.task.text.special import check_known, cut_windows, encode, in_words, text_prefix

CHARACTERS_PER_TOKEN = 16  # a generous bound: texts are read up to this many characters for each token asked for


@dataclass(frozen=True)
class TokenWindows(Samples):
    """Windows of token ids."""

    ids: Tensor  # (windows, window), int64
    source: str  # where the text came from, in words
    begin: str = ""
    unit = "tokens"
    each = "windows"

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, first: int, last: int) -> Batch:
        return {"input_ids": self.ids[first:last]}

    def take(self, places: Sequence[int]) -> TokenWindows:
        return replace(self, ids=self.ids[list(places)])

    def __add__(self, others: TokenWindows) -> TokenWindows:
        return replace(self, ids=torch.cat([self.ids, others.ids]))

    def units(self, first: int, last: int) -> int:
        return (last - first) * self.ids.shape[1]

    @property
    def small(self) -> Batch:
        return {"input_ids": self.ids[:1, :16]}

    @property
    def words(self) -> str:
        windows, window = self.ids.shape
        return f"{windows} windows of {window} tokens"

    @property
    def shape(self) -> list[int]:
        return list(self.ids.shape)

    @property
    def sha256(self) -> str:
        """The hash of the token ids."""
        return hashlib.sha256(self.ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def read_texts(
    sources: str | Path | Iterable[str | Path],
    *,
    tokenizer: Any = None,
    characters: int | None = None,
    tally: Tally | None = None,
    skip_bad: bool = False,
    chat: bool = False,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    text_column: str = "text",
) -> Iterator[str]:
    """Read texts from files or from data sets of the hub, the rows of each as they are learnt from (docs/tune.md).

    Args:
        tokenizer: renders conversations through its chat template.
        characters: stop after about this many.
        tally: counts what is left out.
        skip_bad: leave bad rows out.

    Raises:
        TwofoldError: if a source can't be read, or is neither a file nor a data set; or for a bad row, unless it is skipped.
    """
    tally = Tally() if tally is None else tally
    names = [str(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    read = Sources(dataset_config, dataset_split, tally, characters)
    none = True
    for row in rows_of(names, read, column=text_column, chat=chat, skip_bad=skip_bad):
        try:
            text = _text_of(row, tokenizer, tally)
        except RefusedRowError as error:
            tally.refuse(str(error), skip=skip_bad)
            continue
        none = False
        yield text
        if read.characters is not None:
            read.characters -= len(text)
            if read.characters <= 0:
                return
    if none and tally.skipped:
        raise no_rows(names, tally)


def _text_of(row: Row, tokenizer: Any, tally: Tally) -> str:
    """Return a row as one text; a conversation by the chat template, or as its contents if there is none."""
    if not row.turns:
        return row.prompt + row.completion
    if has_template(tokenizer):
        shown = show(row, tokenizer)
        tally.unshown.update(shown.unshown)
        return shown.text
    if row.tools or any(CALLS in turn.more for turn in row.turns):
        raise no_template(row)
    tally.bare += 1
    return "\n\n".join(turn.content for turn in row.turns)


def token_windows(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    tokens: int,
    window: int,
    held_out: int = 0,
    source: str = "texts",
    bos: str = "auto",
) -> Data:
    """Tokenize texts, join them, and cut the first ``tokens`` into windows that begin as the tokenizer begins a text.

    Args:
        tokens: how many tokens to calibrate on; rounded down to whole windows.
        window: tokens in a window, with those that it begins with.
        bos: "none" for windows of text alone.
        held_out: how many windows to set aside for measuring, spread evenly over as many tokens after those as there are, up to
            ``tokens``: the text goes on with what it was about, and what comes right after flatters a training.

    Raises:
        TwofoldError: if the texts hold less than one window.
    """
    needed = tokens_needed(tokens, held_out * window)
    ids: list[int] = []
    empty = True
    for text in [texts] if isinstance(texts, str) else texts:
        if text.strip():
            empty = False
            # Texts that are cut by a window all the same are joined as paragraphs.
            ids += encode(tokenizer, ("\n\n" if ids else "") + text)
            if len(ids) >= needed:
                break
    if empty:
        raise TwofoldError(f"the calibration text is empty ({source}); give a text with some thousand words")
    check_known(tokenizer, ids, f"the calibration text ({source})")
    prefix = text_prefix(tokenizer) if bos == "auto" else []
    table = cut_windows(ids, window, prefix)
    windows = len(table)
    if windows == 0:
        raise TwofoldError(
            f"the calibration text has {len(ids)} tokens, fewer than one window of {window} ({source}); "
            "give more text, or a smaller `window`"
        )
    calibrated = max(1, min(windows, tokens // window))
    spare = min(held_out, windows - calibrated)
    if held_out and not spare and windows > 1:  # a short text: keep the last tenth to measure on
        spare = min(held_out, max(1, windows // 10))
        calibrated = windows - spare
    after = table[calibrated:][: (needed - tokens) // window]
    calibration = TokenWindows(table[:calibrated].clone(), source, in_words(tokenizer, prefix))
    return Data(calibration, replace(calibration, ids=after[spread(len(after))[:spare]]), tokens)


def spread(count: int) -> list[int]:
    """Return 0 to ``count`` − 1 in an order whose every beginning is spread over them: the middle, the quarters, the eighths.

    So those that are measured are the same, however many are set aside beside them.
    """
    bits = max(count - 1, 0).bit_length()
    # Van der Corput's sequence: the bits of 1, 2, 3, … and at last of 0 in reverse, as a fraction.
    reverse = [int(f"{i:0{bits}b}"[::-1], 2) for i in (*range(1, 1 << bits), 0)]
    return list(dict.fromkeys((place * count) >> bits for place in reverse))[:count]


def tokens_needed(tokens: int, held_out: int) -> int:
    """Return the tokens to read for so many to calibrate on and so many to set aside."""
    return tokens + (max(held_out, tokens) if held_out else 0)
