"""Records from folders of files, rows of files and data sets, each with its place; what can't be read is named, or counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from twofold.errors import TwofoldError
from twofold.task.data.columns import MEDIA, Kind, Record, read_columns
from twofold.task.data.folders import ENDINGS, files_of, is_rows, labelled, left_out, sidecars_of
from twofold.task.data.settings import Columns
from twofold.task.text.row import BadRowError, Row, Tally
from twofold.task.text.rows import no_rows
from twofold.task.text.sources import FILES, Sources, data_files

T = TypeVar("T")


def read_records(names: Iterable[str | Path], settings: Columns, *, kind: Kind, tally: Tally) -> Iterator[Record]:
    """Yield the records of sources, each when it is asked for: files of the kind are named, and not yet read.

    A source is a folder of files (with the names of its folders as labels, or rows about the files in words.jsonl,
    metadata.jsonl, metadata.csv or metadata.parquet), one file of the kind, rows (.jsonl, .json, .csv, .tsv, .parquet) that hold
    the kind or name its file, or a data set; of texts also a file with one on each line.

    Args:
        kind: what each must hold.
        tally: counts what is left out.

    Raises:
        TwofoldError: naming the first bad row, unless such are to be skipped; or if a source can't be read or holds no record.
    """
    sources = [str(name) for name in names]
    reader = _Reader(settings, kind, tally)
    none = True
    for name in sources:
        for record in reader.source(name):
            none = False
            yield record
    if none:
        folder = {"audio": "a folder of .wav, .flac or .mp3 files", "image": "a folder of .png or .jpg files"}
        raise no_rows(
            sources, tally, f"records of {kind}", f"{folder.get(kind, 'a file of texts, one on each line')}, or of rows"
        )


def given_records(values: Iterable[Any], settings: Columns, *, kind: Kind, tally: Tally) -> Iterator[Record]:
    """Yield the records of values from Python: rows as mappings, what ``load_audio`` or ``load_image`` takes, texts, or pairs.

    Raises:
        TwofoldError: naming the first bad one by its number, unless such are to be skipped.
    """
    reader = _Reader(settings, kind, tally)
    for number, value in enumerate(values, 1):
        held = kind in MEDIA and isinstance(value, Mapping) and value.keys() & {"bytes", "array"}
        if isinstance(value, Mapping) and not held:
            yield from reader.row(value, f"sample {number}", None)
        elif kind == "text" and isinstance(value, tuple | list) and len(value) == 2:
            yield from reader.plain({"text": value[0], "target": value[1]}, f"sample {number}")
        else:
            yield from reader.plain({kind: value}, f"sample {number}")


def made_of(records: Iterable[Record], make: Callable[[Record], T], *, tally: Tally, skip_bad: bool) -> Iterator[T]:
    """Yield what is made of each record; one that it can't be made of is named, or counted.

    Args:
        make: raises a ``BadRowError`` for such.

    Raises:
        TwofoldError: naming the first bad record, unless such are to be skipped.
    """
    for record in records:
        try:
            made = make(record)
        except BadRowError as error:
            tally.refuse(f"{record.place}: {error}", skip=skip_bad, mend=record.mend)
            continue
        yield made


class _Reader:
    """How records are read."""

    def __init__(self, settings: Columns, kind: Kind, tally: Tally) -> None:
        self.settings, self.kind, self.tally = settings, kind, tally
        self.sources = Sources(settings.dataset_config, settings.dataset_split, tally, few=True)

    def source(self, name: str) -> Iterator[Record]:
        """Yield the records of a source."""
        paths = data_files(name)
        if not paths:  # a data set of the hub, or none
            yield from self._rows(name, None)
        for path in paths:
            said = name if len(paths) == 1 else str(path)
            if path.is_dir() and not is_rows(path, self.kind):
                yield from self._folder(path, said)
            elif self._is_medium(path):
                yield self._of_file(path, said, None)
            else:
                yield from self._rows(said, path if path.is_dir() else path.parent)

    def _is_medium(self, path: Path) -> bool:
        """Say whether a file is one of audio or an image itself: what has the name of neither is, if it can't be rows."""
        suffix = path.suffix.lower()
        return self.kind in MEDIA and path.is_file() and suffix not in ("", *FILES)

    def _folder(self, folder: Path, name: str) -> Iterator[Record]:
        files = files_of(folder)
        beside = sidecars_of(files) if self.kind in MEDIA else []
        if not beside:
            for file, label in labelled(folder, name, files, self.kind, self.tally):
                said = str(Path(name) / file.relative_to(folder))
                if self.kind in MEDIA:
                    yield self._of_file(file, said, label)
                else:
                    yield from self._rows(said, None, label)
            return
        named = set()
        for sidecar in beside:
            for record in self._rows(str(Path(name) / sidecar.relative_to(folder)), sidecar.parent):
                if isinstance(file := record.fields[self.kind], Path):
                    named.add(file)
                yield record
        left_out({file for file in files if file.suffix.lower() in ENDINGS[self.kind]} - named, self.tally)

    def _of_file(self, path: Path, name: str, label: str | None) -> Record:
        fields = {self.kind: path} | ({} if label is None else {"label": label})
        return Record(name, fields, of_file=True)

    def _rows(self, name: str, folder: Path | None, label: str | None = None) -> Iterator[Record]:
        """Yield the records of rows.

        Args:
            folder: that the paths in them begin in.
            label: of each text in them.
        """
        for place, value in self.sources.values(name):
            if not isinstance(value, Row):
                yield from self.row(value, place, folder)
            elif self.kind in MEDIA:
                raise TwofoldError(
                    f"{name} is a text; name a folder with files of {self.kind}, or a file of rows that name them"
                )
            else:
                for number, line in enumerate(value.completion.splitlines(), 1):
                    if line.strip():
                        yield from self.plain({"text": line.strip(), "label": label}, f"{place}, line {number}")

    def plain(self, fields: Mapping[str, Any], place: str) -> Iterator[Record]:
        """Yield the record of fields that are known by their own names."""
        yield from self.row(fields, place, None, Columns())

    def row(self, value: Any, place: str, folder: Path | None, columns: Columns | None = None) -> Iterator[Record]:
        """Yield the record of a row; none if it is left out."""
        try:
            if isinstance(value, BadRowError):
                raise value
            record = read_columns(value, place, columns or self.settings, self.kind)
        except BadRowError as error:
            self.tally.refuse(f"{place}: {error}", skip=self.settings.skip_bad)
            return
        held = record.fields[self.kind]
        if isinstance(held, str) and not held.strip():
            self.tally.blank += 1
            return
        self.tally.unread.update(record.others)
        yield (
            replace(record, fields={**record.fields, self.kind: _placed(held, folder)})
            if self.kind in MEDIA
            else record
        )


def _placed(held: Any, folder: Path | None) -> Any:
    """Return what a row holds of audio or an image, with the path of a file put into the folder of the row."""
    if isinstance(held, Mapping) and held.get("bytes") is None and isinstance(held.get("path"), str):
        held = held["path"]
    if isinstance(held, str) and "://" not in held:
        return Path(held) if folder is None else folder / held
    return held
