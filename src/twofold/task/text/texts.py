"""Texts from files, a datasets name or a Python iterable, cut into windows of tokens."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.host.faults import errors_in_words
from twofold.host.quiet import first_line
from twofold.task import Batch, Data, Samples
from twofold.task.text.special import check_known, cut_windows, encode, in_words, text_prefix

CHARACTERS_PER_TOKEN = 16  # a generous bound: texts are read up to this many characters for each token asked for
WIKITEXT = re.compile(r"wiki\..*\.raw$")


@dataclass(frozen=True)
class TokenWindows(Samples):
    """Windows of token ids."""

    ids: Tensor  # (windows, window), int64
    source: str  # where the text came from, in words
    begin: str = ""
    unit = "tokens"

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
    def shape(self) -> list[int]:
        return list(self.ids.shape)

    @property
    def sha256(self) -> str:
        """The hash of the token ids."""
        return hashlib.sha256(self.ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def wikitext_rows(text: str) -> str:
    """Return WikiText's raw file as the published tables read it: a lone space is an empty row, two newlines join rows."""
    rows = text.split("\n")
    if rows and rows[-1] == "":
        rows.pop()
    return "\n\n".join("" if row == " " else row + "\n" for row in rows)


@dataclass(frozen=True)
class Rows:
    """How the rows of data sets and of .jsonl files are read; one without a text is refused with where it stands."""

    config: str | None  # of a data set
    split: str  # of a data set
    column: str  # the field with the text
    tokenizer: Any  # renders "messages" through its chat template

    def of_line(self, line: str, where: str) -> str:
        """Return the text of a line of JSON."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # beside no JSON: a number of too many digits, too much nesting
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise TwofoldError(
                f"{where} is not JSON: {reason}; a .jsonl file has one JSON object on each line"
            ) from error
        text = self.of_row(row, where)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # "\ud800" in JSON: half of a character
            raise TwofoldError(f"{where} holds half of a character (a lone surrogate); convert it first") from error
        return text

    def of_row(self, row: Any, where: str) -> str:
        """Return the text of a row."""
        if isinstance(row, dict):
            if isinstance(row.get(self.column), str):
                return str(row[self.column])
            if isinstance(row.get("messages"), list):
                if not getattr(self.tokenizer, "chat_template", None):
                    return "\n\n".join(str(m.get("content", "")) for m in row["messages"] if isinstance(m, dict))
                try:
                    return str(self.tokenizer.apply_chat_template(row["messages"], tokenize=False))
                except Exception as error:  # a template may refuse a role or an order
                    raise TwofoldError(f"the chat template refuses {where}: {first_line(error)}") from error
            for answer in ("completion", "response"):
                if isinstance(row.get("prompt"), str) and isinstance(row.get(answer), str):
                    return str(row["prompt"]) + str(row[answer])
        raise TwofoldError(
            f"{where} has no text: it needs a field {self.column!r}, 'messages', or 'prompt' and 'completion'"
        )

    def of_dataset(self, name: str) -> Iterator[str]:
        """Yield the texts of a data set that are not empty."""
        try:
            import datasets
        except ImportError as error:
            raise TwofoldError(
                f"{name} is not a file; to read a data set of that name, install the library: pip install datasets"
            ) from error
        with errors_in_words(
            lambda error: f"{name} is neither a file nor a data set that can be read: {first_line(error)}"
        ):
            for row in datasets.load_dataset(name, self.config, split=self.split, streaming=True):
                text = self.of_row(row, f"the data set {name}")
                if text.strip():
                    yield text


def read_texts(
    sources: str | Path | Iterable[str | Path], rows: Rows, *, characters: int | None = None
) -> Iterator[str]:
    """Read texts from files or from a data set of the hub.

    Args:
        sources: paths of text files (.txt, .raw, .md, …: one text each) or of .jsonl files (one text a row, from "text",
            "messages", or "prompt" and "completion"), or else names for ``datasets.load_dataset``.
            WikiText's raw files (wiki.*.raw) are joined the way the published tables read them.
        characters: stop after about this many.

    Raises:
        TwofoldError: if a source can't be read, or is neither a file nor a data set.
    """
    left = characters if characters is not None else float("inf")
    for source in _expand([sources] if isinstance(sources, str | Path) else sources):
        for text in _read_one(source, left, rows):
            yield text
            left -= len(text)
            if left <= 0:
                return


def _expand(sources: Iterable[str | Path]) -> Iterator[str]:
    """Yield each source, and the files that a pattern such as texts/*.txt stands for, in order."""
    for source in map(str, sources):
        source = source if source[:1] != "~" else str(Path(source).expanduser())
        if not any(sign in source for sign in "*?[") or Path(source).exists():
            yield source
            continue
        paths = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 (patterns may be absolute)
        if not paths:
            raise TwofoldError(f"no file matches {source}; check the path")
        yield from paths


def _read_one(source: str, limit: float, rows: Rows) -> Iterator[str]:
    path = Path(source)
    if path.is_dir() and not (path / "dataset_info.json").exists() and not any(path.glob("*.parquet")):
        raise TwofoldError(f"{source} is a folder: name the text files in it, as in {source.rstrip('/')}/*.txt")
    if not path.is_file():
        if not path.exists() and (
            path.suffix in (".txt", ".raw", ".md", ".jsonl", ".json") or source.startswith((".", "/", "~"))
        ):
            raise TwofoldError(f"there is no file {source}; check the path")
        yield from rows.of_dataset(source)
        return
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix in (".jsonl", ".json"):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield rows.of_line(line, f"{source}, line {number}")
            else:
                text = file.read(int(limit) if limit != float("inf") else -1)
                yield wikitext_rows(text) if WIKITEXT.search(path.name) else text
    except UnicodeDecodeError as error:
        raise TwofoldError(f"{source} is not a text file in UTF-8; convert it first") from error
    except OSError as error:
        raise TwofoldError(f"{source} can't be read: {error.strerror}") from error


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
