"""The bytes of a file of audio or of an image: of a path, or as data sets hold them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twofold.task.text.row import BadRowError


def encoded(value: Any) -> bytes | None:
    """Return the bytes of a file that a value is, names or holds, as {"bytes", "path"}; None for a value of another kind.

    Raises:
        BadRowError: if there is no such file, it can't be read, or it is empty.
    """
    if isinstance(value, Mapping):
        held = value.get("bytes")
        value = value.get("path") if held is None else held
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
    elif isinstance(value, str | Path):
        data = _read(str(value))
    else:
        return None
    if not data:
        raise BadRowError("the file is empty")
    return data


def _read(name: str) -> bytes:
    if "://" in name:
        raise BadRowError(f"{name} is not on this machine; fetch the files first, and name their folder")
    try:
        if not Path(name).is_file():
            raise BadRowError(f"there is no file {name}")
        return Path(name).read_bytes()
    except OSError as error:
        raise BadRowError(f"{name} can't be read: {error.strerror or error}") from error
