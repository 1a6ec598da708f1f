"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from twofold.errors import TwofoldError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, or the limit of a file


def place_error(path: Path, error: Exception) -> TwofoldError:
    """Say why a file or folder can't be written, and what to do: free some space, or name another place."""
    reason = getattr(error, "strerror", None) or str(error)
    full = getattr(error, "errno", None) in FULL or any(
        words in str(error) for words in ("No space left", "File too large")
    )
    if full:
        return TwofoldError(f"no space left while writing {path} ({reason}); free some space and run again")
    return TwofoldError(f"{path} can't be written: {reason}; name another place (`out`, `moments`, TWOFOLD_CACHE)")


def make_folder(folder: Path) -> None:
    """Make a folder to write to.

    Raises:
        TwofoldError: if it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise place_error(folder, error) from error


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
        raise place_error(path, error) from error
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
    """Return the lock of a folder among the processes of a user on this machine; it ends with the process that holds it.

    Raises:
        TwofoldError: if there is no folder for temporary files.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    # By number where there is one: a user of a container may have no name.
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    return FileLock(temporary_folder() / f"twofold-{user}-{name}.lock")


def temporary_folder() -> Path:
    """Return the folder for temporary files.

    Raises:
        TwofoldError: if there is none that can be written.
    """
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise TwofoldError(
            f"there is no folder for temporary files ({error.strerror}); name one with TMPDIR"
        ) from error
