"""Windows to measure on, by the protocol that published WikiText-2 figures use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from twofold.errors import TwofoldError
from twofold.task.text.texts import CHARACTERS_PER_TOKEN, Rows, TokenWindows, read_texts


def evaluation_windows(
    source: str | Path | Iterable[str | Path],
    tokenizer: Any,
    *,
    window: int = 1024,
    windows: int | None = 16,
    dataset_config: str | None = None,
    dataset_split: str = "test",
    text_column: str = "text",
) -> TokenWindows:
    """Return non-overlapping windows of a text, tokenized without special tokens.

    Args:
        source: text files or a data set name; wiki.*.raw files are joined row by row as the published tables do.
        windows: how many; None for all. A text that is shorter gives what it has, at least one.

    Raises:
        TwofoldError: if the text is empty or shorter than one window.
    """
    names = [str(source)] if isinstance(source, str | Path) else [str(name) for name in source]
    limit = None if windows is None else windows * window * CHARACTERS_PER_TOKEN
    rows = Rows(dataset_config, dataset_split, text_column, tokenizer)
    text = "\n\n".join(read_texts(names, rows, characters=limit))
    if not text.strip():
        raise TwofoldError(f"the evaluation text is empty ({', '.join(names)})")
    # So many characters hold the windows in any natural text; one that they do not is tokenized as far as it was read.
    ids = tokenizer(text if limit is None else text[:limit], add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // window if windows is None else min(len(ids) // window, windows)
    if count == 0:
        raise TwofoldError(
            f"the evaluation text has {len(ids)} tokens, fewer than one window of {window} ({', '.join(names)}); "
            "give more text, or measure in smaller windows"
        )
    table = torch.tensor(ids[: count * window], dtype=torch.int64).view(count, window)
    return TokenWindows(table, ", ".join(Path(name).name for name in names))
