"""Windows to measure on, by the protocol that published WikiText-2 figures use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.task.text.row import Tally
from twofold.task.text.special import check_known, cut_windows, encode, in_words, text_prefix
from twofold.task.text.texts import CHARACTERS_PER_TOKEN, TokenWindows, read_texts


def evaluation_windows(
    source: str | Path | Iterable[str | Path],
    tokenizer: Any,
    *,
    window: int = 1024,
    windows: int | None = 16,
    dataset_split: str = "test",
    bos: str = "auto",
    **reading: Any,
) -> TokenWindows:
    """Return windows of a text that do not overlap, each of which begins as the tokenizer begins a text.

    Args:
        source: text files or a data set name; wiki.*.raw files are joined row by row as the published tables do.
        window: tokens in one, with those that it begins with.
        windows: how many; None for all. A text that is shorter gives what it has, at least one.
        bos: "none" for windows of text alone.
        reading: the other settings of ``read_texts``.

    Raises:
        TwofoldError: if the text is empty or shorter than one window.
    """
    names = [str(source)] if isinstance(source, str | Path) else [str(name) for name in source]
    limit = None if windows is None else windows * window * CHARACTERS_PER_TOKEN
    tally = Tally()
    reading = {**reading, "dataset_split": dataset_split, "tokenizer": tokenizer, "tally": tally}
    text = "\n\n".join(read_texts(names, characters=limit, **reading))
    if not text.strip():
        raise TwofoldError(f"the evaluation text is empty ({', '.join(names)})")
    # So many characters hold the windows in any natural text; one that they do not is tokenized as far as it was read.
    ids = encode(tokenizer, text if limit is None else text[:limit])
    check_known(tokenizer, ids, f"the evaluation text ({', '.join(names)})")
    prefix = text_prefix(tokenizer) if bos == "auto" else []
    table = cut_windows(ids, window, prefix)[:windows]
    if not len(table):
        raise TwofoldError(
            f"the evaluation text has {len(ids)} tokens, fewer than one window of {window} ({', '.join(names)}); "
            "give more text, or measure in smaller windows"
        )
    tally.tell()
    return TokenWindows(table, ", ".join(Path(name).name for name in names), in_words(tokenizer, prefix))
