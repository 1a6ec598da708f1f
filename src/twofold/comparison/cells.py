"""The finished rows of a comparison, one file each, so that a killed one goes on and a larger grid runs its new cells only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic
from filelock import Timeout

from twofold.comparison.record import ComparisonRow
from twofold.errors import TwofoldError
from twofold.host.files import lock_of, make_folder, write_text

SETTINGS_FILE = "arena.json"


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Let no other comparison write to the folder within the block; the lock ends with the process.

    Raises:
        TwofoldError: if another one does, or the folder holds what no comparison wrote.
    """
    if out.is_file():
        raise TwofoldError(f"the output {out} is a file; name a folder")
    if out.is_dir() and not (out / SETTINGS_FILE).is_file() and any(out.iterdir()):
        raise TwofoldError(f"the folder {out} was not written by twofold compare; name another one with `out`")
    is_new = not out.exists()
    make_folder(out)
    lock = lock_of(out)
    try:
        lock.acquire(timeout=0.5)
    except Timeout as error:
        raise TwofoldError(
            f"another comparison works on {out}; wait for it, stop it, or name another folder with `out`"
        ) from error
    try:
        yield
    finally:
        if is_new and not any(out.iterdir()):
            out.rmdir()  # refused before any work
        lock.release()


class CellStore:
    """The rows in a folder that belong to one model, its texts and one set of settings."""

    def __init__(self, out: Path, belongs: dict[str, Any]) -> None:
        """
        Args:
            belongs: what the rows depend on, by names that a reader knows: model, texts, settings, version.

        Raises:
            TwofoldError: if the folder holds rows of something else; it says in what they differ.
        """
        self.folder = out / "cells"
        self.mark = hashlib.sha256(json.dumps(belongs, sort_keys=True).encode()).hexdigest()
        path = out / SETTINGS_FILE
        if not path.is_file():
            write_text(path, json.dumps(belongs, indent=1) + "\n")
            return
        try:
            stored: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise TwofoldError(f"{path} can't be read; delete the folder {out} or name another one") from error
        differs = sorted(key for key in stored.keys() | belongs.keys() if stored.get(key) != belongs.get(key))
        if differs:
            raise TwofoldError(
                f"{out} holds a comparison of another kind (it differs in: {', '.join(differs)}); name another folder "
                "with `out`, or delete this one"
            )

    def load(self, name: str, extra: str = "") -> ComparisonRow | None:
        """Read a finished row; None if there is none that can be read and belongs here."""
        try:
            entry = json.loads(self._path(name).read_text(encoding="utf-8"))
            return ComparisonRow.model_validate(entry["row"]) if entry["mark"] == self._mark(name, extra) else None
        except (OSError, ValueError, KeyError, TypeError, pydantic.ValidationError):
            return None

    def save(self, name: str, row: ComparisonRow, extra: str = "") -> None:
        """Keep a finished row.

        Args:
            extra: what it depends on beside the rest, as the version of another library.
        """
        entry = {"mark": self._mark(name, extra), "row": row.model_dump(mode="json")}
        write_text(self._path(name), json.dumps(entry, indent=1) + "\n")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _mark(self, name: str, extra: str) -> str:
        return hashlib.sha256(f"{self.mark} {name} {extra}".encode()).hexdigest()
