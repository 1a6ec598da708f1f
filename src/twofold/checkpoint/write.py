"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from twofold.errors import TwofoldError


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists, before any work.

    Raises:
        TwofoldError: if it exists and may not be replaced, or can't be made.
    """
    if out.is_file():
        raise TwofoldError(f"the output {out} is a file; name a folder")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise TwofoldError(f"the output folder {out} exists; name another one, or replace it with --overwrite")
        if not (out / "config.json").exists():
            raise TwofoldError(f"the output folder {out} holds no model, so it is not replaced; name another one")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise TwofoldError(f"the output folder {out} can't be made: no permission to write in {parent}")


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin what will not fit.

    Raises:
        TwofoldError: if the disk has less than ``needed`` bytes free.
    """
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise TwofoldError(
            f"no space for {out}: it needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; free some space first"
        )


@contextmanager
def staged_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that takes its place at the end; on any failure it vanishes.

    Raises:
        TwofoldError: if ``out`` exists and may not be replaced, or the disk is full.
    """
    check_output(out, overwrite)
    parent = out.absolute().parent
    staged: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(f".{out.name}.*.partial"):  # left by a killed run
            shutil.rmtree(stale, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
        staged.chmod(0o777 & ~_umask())
        yield staged
        for file in staged.iterdir():
            file.chmod(0o666 & ~_umask())
        if out.exists():
            old = out.with_name(f".{out.name}.{os.getpid()}.old")
            out.rename(old)
            staged.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            staged.rename(out)
    except (OSError, SafetensorError) as error:
        if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in str(
            error
        ):
            raise TwofoldError(f"no space left while writing {out}; free some space and run again") from error
        if isinstance(error, PermissionError):
            raise TwofoldError(f"the output folder {out} can't be written: {error.strerror}") from error
        raise
    finally:
        if staged is not None and staged.exists():
            shutil.rmtree(staged, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
