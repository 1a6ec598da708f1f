"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from twofold.errors import TwofoldError


def make_folder(folder: Path) -> None:
    """Make a folder to write to.

    Raises:
        TwofoldError: if it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TwofoldError(f"the folder {folder} can't be made: {error.strerror}; name another one") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it.

    Args:
        write: writes the file that it is given the path of.

    Raises:
        TwofoldError: if the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise TwofoldError(
            f"{path} can't be written: {error}; free some space, or name another place (`out`, `moments`, TWOFOLD_CACHE)"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        TwofoldError: if the disk does not take it.
    """
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def lock_of(folder: Path) -> FileLock:
    """Return the lock of a folder among the processes of a user on this machine; it ends with the process that holds it."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    return FileLock(Path(tempfile.gettempdir()) / f"twofold-{getpass.getuser()}-{name}.lock")
