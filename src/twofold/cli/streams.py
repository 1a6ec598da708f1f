"""The standard streams as people really have them: closed, cut off, or of an encoding that lacks our letters."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from twofold.errors import TwofoldError

CUT_OFF = 141  # as a shell tells that a program ended when nobody read it any more


def give_streams() -> None:
    """Put the null device in the place of closed streams; a letter that an encoding lacks is replaced in all."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 (as long as the process)
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="replace")


@contextmanager
def until_cut_off(result: str | None = None) -> Iterator[None]:
    """End the process quietly if nobody reads its output any more, as after ``| head -1``.

    Args:
        result: where the command writes what it makes.

    Raises:
        TwofoldError: if the output can't be written for another reason, such as a full disk.
    """
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except (OSError, SystemExit) as error:
        # click and rich, which write the help, end the process themselves
        cause = error.__context__ if isinstance(error, SystemExit) else error
        if isinstance(cause, BrokenPipeError):
            _give_up(sys.stdout, sys.stderr)
            sys.exit(CUT_OFF)
        if not isinstance(cause, OSError) or cause.filename is not None or _takes(sys.stdout):
            raise
        _give_up(sys.stdout)
        place = f", and look into {result} for the result" if result and Path(result).exists() else ""
        raise TwofoldError(
            f"the standard output can't be written ({cause.strerror}); give it a place with room{place}"
        ) from error


def _takes(stream: TextIO) -> bool:
    """Tell whether a stream takes anything, by an empty line: an error in writing does not say where it was written to."""
    try:
        stream.write("\n")
        stream.flush()
    except OSError:
        return False
    return True


def _give_up(*streams: TextIO) -> None:
    """Let streams go to the null device, with what Python writes out at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with suppress(OSError, ValueError):  # one that is no file
            os.dup2(null, stream.fileno())
