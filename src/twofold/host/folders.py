"""A folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from twofold.errors import TwofoldError
from twofold.host.files import place_error

COMPRESSED = ("config.json", "plan.json", "run.json")  # what every factored checkpoint holds
EXPORTED = "twofold-export.json"  # what an export holds
TUNED = ("tune", "merge", "extract")  # the kinds of run.json in the folders of those commands


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists, before any work.

    Raises:
        TwofoldError: if it exists and may not be replaced, or can't be made.
    """
    if not out.name:
        raise TwofoldError(f"the output {out} can't be made a folder; name another one")
    if out.is_file():
        raise TwofoldError(f"the output {out} is a file; name a folder")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise TwofoldError(f"the output folder {out} exists; name another one, or replace it with `overwrite`")
        if not is_by_twofold(out):
            raise TwofoldError(
                f"the output folder {out} was not written by Twofold, so it is not replaced; name another"
            )
    check_place(out)


def check_place(out: Path) -> None:
    """Refuse a file or folder that can't be made; the rights alone don't tell, so one beside it is made and removed.

    Raises:
        TwofoldError: if it can't, for whatever reason.
    """
    parent = _nearest(out.absolute().parent)
    # As long as the longest name that it will have.
    trial = parent / f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}.attempt"
    try:
        trial.mkdir()
    except OSError as error:
        raise TwofoldError(
            f"{out} can't be made: {error.strerror} ({parent}); name another place (`out`, `moments`, TWOFOLD_CACHE)"
        ) from error
    finally:
        with suppress(OSError):
            trial.rmdir()


def is_by_twofold(out: Path) -> bool:
    """Tell whether a folder holds what we write: a factored checkpoint, an export, or what was tuned, merged or extracted."""
    compressed = all((out / name).exists() for name in COMPRESSED)
    return compressed or (out / EXPORTED).exists() or tuned_record(out) is not None


def tuned_record(folder: Path) -> dict[str, Any] | None:
    """Read the run.json of a fine-tuning, a merge or an extraction; None if the folder holds none of them."""
    with suppress(OSError, ValueError):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("kind") in TUNED:
            return record
    return None


def check_apart(out: Path, models: Iterable[Path | None], others: Iterable[Path] = ()) -> None:
    """Refuse an output folder that would take the place of what the run reads, or lie in it.

    Args:
        models: the folders of all models and adapters that are read; None for those of the hub.
        others: texts, moments and whatever else is read; the folder of a text may be that of results, too.

    Raises:
        TwofoldError: if one of them lies in it, or it lies in the folder of a model or an adapter.
    """
    place, folders = out.resolve(), list(filter(None, models))
    for path in (*folders, *others):
        if path.resolve().is_relative_to(place):
            raise TwofoldError(f"the output folder {out} holds {path}, which this run reads; name another one")
    for folder in folders:
        if place.is_relative_to(folder.resolve()):
            raise TwofoldError(f"the output folder {out} lies in {folder}, which this run reads; name another one")


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin what will not fit.

    Raises:
        TwofoldError: if the disk has less than ``needed`` bytes free.
    """
    parent = _nearest(out)
    if parent != out.absolute():
        check_place(out)
    free = free_space(out)
    if free < needed:
        raise TwofoldError(
            f"no space for {out}: it needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; free some space first"
        )


def free_space(out: Path) -> int:
    """Return the free bytes of the disk where a file or folder is or will be."""
    return shutil.disk_usage(_nearest(out)).free


def _nearest(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


@contextmanager
def staged_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that takes its place at the end; on any failure it vanishes.

    Raises:
        TwofoldError: if ``out`` exists and may not be replaced, or the disk is full or can't be written.
    """
    out = out.expanduser().resolve()
    check_output(out, overwrite)
    # Named before it is made, so that nothing stays wherever a run is stopped.
    staged = out.with_name(f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    mask = os.umask(0)
    os.umask(mask)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        staged.mkdir()
        yield staged
        for file in filter(Path.is_file, staged.rglob("*")):
            file.chmod(0o666 & ~mask)
        _put_in_place(staged, out)
    except (OSError, SafetensorError) as error:
        raise place_error(out, error) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _put_in_place(staged: Path, out: Path) -> None:
    """Rename the finished folder to its place; if that fails, put back what was there before."""
    if not out.exists():
        staged.rename(out)
        return
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(old)
    try:
        staged.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(out: Path) -> None:
    """Remove what killed runs to the same place left; those that still run are left alone."""
    stale = re.compile(rf"\.{re.escape(out.name)}\.(\d+)\.(?:[^.]+\.partial|old)")
    for folder in out.parent.iterdir():
        if (match := stale.fullmatch(folder.name)) and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)
