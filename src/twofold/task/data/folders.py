"""Folders of clips, images or texts: which of their files are read, and what is said of the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

from twofold.errors import TwofoldError
from twofold.task.data.columns import Kind
from twofold.task.text.row import Tally
from twofold.task.text.sources import is_dataset

# Files that stand for what they hold; of some that can't be read the error is better than that they are left out.
ENDINGS: dict[Kind, tuple[str, ...]] = {
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au", ".m4a", ".aac", ".wma", ".webm"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2", ".heic"),
    "text": (".txt",),
}  # fmt: skip
SIDECARS = ("words.jsonl", "metadata.jsonl", "metadata.csv", "metadata.parquet")  # rows that name the files beside them


def is_rows(folder: Path, medium: Kind) -> bool:
    """Say whether a folder is a data set of rows."""
    return is_dataset(folder) and not (medium != "text" and any((folder / name).is_file() for name in SIDECARS))


def files_of(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted, without hidden ones.

    Raises:
        TwofoldError: if a folder among them can't be read.
    """

    def refuse(error: OSError) -> None:
        raise TwofoldError(f"the folder {error.filename} can't be read: {error.strerror or error}") from error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def sidecars_of(files: list[Path]) -> list[Path]:
    """Return the files with rows about those beside them, one of each folder."""
    first: dict[Path, Path] = {}
    for name in SIDECARS:
        for file in (file for file in files if file.name == name):
            first.setdefault(file.parent, file)
    return sorted(first.values())


def labelled(
    folder: Path, name: str, files: list[Path], medium: Kind, tally: Tally
) -> Iterator[tuple[Path, str | None]]:
    """Yield the files of a medium, with the names of their folders as labels if they stand in several.

    The folders take turns, so that the first files are of all.

    Raises:
        TwofoldError: if there is none.
    """
    ours = [file for file in files if file.suffix.lower() in ENDINGS[medium]]
    left_out(set(files) - set(ours), tally)
    if not ours:
        ends = ", ".join(ENDINGS[medium][:4])
        hint = (
            f"name the files in it, as in {name.rstrip('/')}/*.jsonl"
            if medium == "text"
            else "name the folder that has them"
        )
        raise TwofoldError(f"{name} is a folder without any file of {medium} ({ends}); {hint}")
    places: dict[Path, list[Path]] = {}
    for file in ours:
        places.setdefault(file.parent, []).append(file)
    several = len(places.keys() - {folder}) > 1
    for file in filter(None, chain.from_iterable(zip_longest(*places.values()))):
        yield file, file.parent.name if several and file.parent != folder else None


def left_out(files: set[Path], tally: Tally) -> None:
    """Count files that are not read."""
    tally.files.update(file.suffix.lower() or file.name for file in files)
