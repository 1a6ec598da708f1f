"""Where rows stand: files of JSON, tables, texts, packed ones too, and data sets; each value comes with its place."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TextIO

from twofold.errors import TwofoldError
from twofold.host.faults import errors_in_words
from twofold.host.quiet import first_line
from twofold.task.text.demo import DEMO, DEMO_FILE
from twofold.task.text.formats import is_row
from twofold.task.text.row import BadRowError, Row, Tally, from_json, parsed_if
from twofold.task.text.turns import are_turns

WIKITEXT = re.compile(r"wiki\..*\.raw$")
JSON, TABLES = (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}
FILES = (
    *JSON,
    *TABLES,
    ".parquet",
    ".gz",
    ".txt",
    ".raw",
    ".md",
)  # a name that ends so is one of a file, never of a data set
LISTS = ("data", "train", "rows", "examples", "instances")  # fields of an object that is a file, with the rows in it
LONGEST_CELL = 2**31 - 1
FIRST_LINE = 1_000_000  # characters that tell whether a file of another name holds rows


def data_files(source: str) -> list[Path]:
    """Return the files and folders of this machine that a source names; none if it is a data set of the hub."""
    if source == DEMO:
        return [DEMO_FILE]
    path = Path(source).expanduser()
    if any(sign in str(path) for sign in "*?[") and not path.exists():
        return [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (patterns may be absolute)
    return [path] if path.exists() else []


def wikitext_rows(text: str) -> str:
    """Return WikiText's raw file as the published tables read it: a lone space is an empty row, two newlines join rows."""
    rows = text.split("\n")
    if rows and rows[-1] == "":
        rows.pop()
    return "\n\n".join("" if row == " " else row + "\n" for row in rows)


@dataclass
class Sources:
    """How sources are read."""

    config: str | None  # of a data set
    split: str  # of a data set
    tally: Tally  # of what a file holds beside its rows
    characters: int | None = None  # that are still asked for; None reads all
    few: bool = False  # only the first rows are asked for, so a data set is not fetched as a whole

    def values(self, source: str) -> Iterator[tuple[str, Any]]:
        """Yield each value of a source with its place: JSON, a row that is made already, or the error that it is.

        Raises:
            TwofoldError: if the source can't be read.
        """
        paths = data_files(source)
        if not paths and any(sign in source for sign in "*?["):
            raise TwofoldError(f"no file matches {source}; check the path")
        if not paths and (Path(source).suffix in FILES or source.startswith((".", "/", "~"))):
            raise TwofoldError(f"there is no file {source}; check the path")
        if not paths:
            yield from self._dataset(source)
        for path in paths:
            name = source if len(paths) == 1 and Path(source).expanduser() == path else str(path)
            yield from self._folder(path, name) if path.is_dir() else self._file(path, name)

    def _file(self, path: Path, name: str) -> Iterator[tuple[str, Any]]:
        suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
        try:
            with _opened(path) as packed:
                if suffix == ".parquet":
                    yield from _parquet(packed, name)
                    return
                file = _text(packed, path)
                if suffix in TABLES:
                    yield from _table(file, name, TABLES[suffix])
                elif suffix in JSON or _begins_with_row(file):
                    yield from self._json(file, name)
                else:
                    text = file.read(-1 if self.characters is None else self.characters)
                    yield name, Row(name, completion=wikitext_rows(text) if WIKITEXT.search(path.name) else text)
        except UnicodeDecodeError as error:
            raise TwofoldError(f"{name} is not a text file in UTF-8; convert it first") from error
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise TwofoldError(f"{name} can't be unpacked ({error}); pack it again") from error
        except OSError as error:
            raise TwofoldError(f"{name} can't be read: {error.strerror or error}") from error

    def _json(self, file: TextIO, name: str) -> Iterator[tuple[str, Any]]:
        """Yield rows of a file of JSON: one a line, or a list of them, or an object that holds such a list."""
        first = _parsed(next((line for line in file if line.strip()), "null"))
        file.seek(0)
        whole: Any = None
        if isinstance(first, BadRowError | list) or self._list_in(first) is not None:
            whole = _parsed(file.read())
            file.seek(0)
        key = self._list_in(whole)
        if isinstance(whole, list):
            yield from ((f"{name}, row {number}", row) for number, row in enumerate(whole, 1))
        elif key is not None:
            self.tally.unread.update(f"{other} of the file" for other, held in whole.items() if other != key and held)
            yield from ((f"{name}, row {number} of {key!r}", row) for number, row in enumerate(whole[key], 1))
        elif isinstance(first, BadRowError) and isinstance(whole, dict):  # one row on many lines
            yield f"{name}, row 1", whole
        else:
            yield from ((f"{name}, line {n}", _parsed(line)) for n, line in enumerate(file, 1) if line.strip())

    def _list_in(self, whole: Any) -> str | None:
        """Return the field with the list of rows in an object that is a file; None for another value."""
        keys = (self.split, *LISTS) if isinstance(whole, dict) and not is_row(whole) else ()
        return next((key for key in keys if isinstance(whole.get(key), list)), None)

    def _folder(self, path: Path, name: str) -> Iterator[tuple[str, Any]]:
        """Yield the rows of a data set in a folder."""
        if not is_dataset(path):
            raise TwofoldError(
                f"{name} is a folder: name the files in it, as in {name.rstrip('/')}/*.jsonl or {name.rstrip('/')}/*.txt"
            )
        yield from self._dataset(name, kept=_is_kept(path))

    def _dataset(self, name: str, *, kept: bool = False) -> Iterator[tuple[str, Any]]:
        try:
            import datasets
        except ImportError as error:
            raise TwofoldError(
                f"{name} is not a file; to read a data set of that name, install the library: pip install datasets"
            ) from error
        with errors_in_words(lambda e: f"{name} is neither a file nor a data set that can be read: {first_line(e)}"):
            if kept:
                rows = self._kept(datasets.load_from_disk(str(Path(name).expanduser())), name)
            else:
                some = self.few or self.characters is not None
                streaming = some and "[" not in self.split  # a part is of a whole that is there
                rows = datasets.load_dataset(name, self.config, split=self.split, streaming=streaming)
            for number, row in enumerate(rows if kept else _undecoded(rows), 1):
                yield f"{name} ({self.split}), row {number}", _without_nulls(dict(row))

    def _kept(self, kept: Any, name: str) -> Iterator[Any]:
        """Yield the rows that the split names of what save_to_disk wrote; one data set alone is every split.

        Raises:
            TwofoldError: if there is no such split.
        """
        from datasets import ReadInstruction

        splits = kept if isinstance(kept, dict) else {re.split(r"\W", self.split)[0]: kept}
        try:
            parts = ReadInstruction.from_spec(self.split).to_absolute(
                {split: len(rows) for split, rows in splits.items()}
            )
        except ValueError as error:
            raise TwofoldError(
                f"{name} has no `dataset_split={self.split}`; its splits are {', '.join(splits)}"
            ) from error
        for part in parts:
            yield from _undecoded(splits[part.splitname].select(range(part.from_, part.to)))


def is_dataset(folder: Path) -> bool:
    """Say whether a folder holds a data set."""
    return _is_kept(folder) or (folder / "dataset_info.json").exists() or any(folder.glob("*.parquet"))


def _is_kept(folder: Path) -> bool:
    """Say whether a folder was written by save_to_disk."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _undecoded(rows: Any) -> Any:
    """Return a data set whose audio and images are files as they are: what reads them tells of each that is damaged."""
    for name, feature in (rows.features or {}).items():
        if getattr(feature, "decode", False) is True:
            rows = rows.cast_column(name, replace(feature, decode=False))
    return rows


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file once, so that it can be gone back in: of a pipe, what comes out of it is kept aside first."""
    with path.open("rb") as file:
        if file.seekable():
            yield file
            return
        with tempfile.TemporaryFile() as kept:
            shutil.copyfileobj(file, kept)
            kept.seek(0)
            yield kept


def _text(file: IO[bytes], path: Path) -> TextIO:
    """Return a file as a text in UTF-8, with or without a mark of byte order, packed or not."""
    unpacked: Any = gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file
    return io.TextIOWrapper(unpacked, encoding="utf-8-sig")


def _begins_with_row(file: TextIO) -> bool:
    """Say whether the first line of a file is a JSON object, whatever the name of the file, and go back to its beginning."""
    line = file.readline(FIRST_LINE)
    file.seek(0)
    return line.lstrip()[:1] == "{" and isinstance(_parsed(line), dict)


def _parsed(text: str) -> Any:
    try:
        return from_json(text)
    except BadRowError as error:
        return error


def _table(file: TextIO, name: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a table whose first line names the fields; an empty cell is a field that is not there.

    Raises:
        TwofoldError: if it is no table, or two of its columns have one name.
    """
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        reader = csv.DictReader(file, delimiter=delimiter)
        twice = [column for column, count in Counter(reader.fieldnames or ()).items() if column and count > 1]
        if twice:
            raise TwofoldError(f"{name} has more than one column {twice[0]!r}; give each a name of its own")
        for number, row in enumerate(reader, 1):
            more = BadRowError("it has more cells than the first line has names") if None in row else None
            yield f"{name}, row {number}", more or {key: _cell(cell) for key, cell in row.items()}
    except csv.Error as error:
        raise TwofoldError(f"{name} is not a table: {error}") from error
    finally:
        csv.field_size_limit(before)


def _cell(cell: str | None) -> Any:
    """Return a cell: turns if it holds them as JSON, or else its text; None if it is empty."""
    return parsed_if(cell, are_turns) if cell else None


def _parquet(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise TwofoldError(f"{name} is a table in Parquet; to read it, install pyarrow: pip install pyarrow") from error
    with errors_in_words(lambda error: f"{name} is not a table in Parquet that can be read: {first_line(error)}"):
        rows = (row for batch in ParquetFile(file).iter_batches(1024) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{name}, row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Return a value of a table without fields that are null: tables give every object of a column the fields of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value
