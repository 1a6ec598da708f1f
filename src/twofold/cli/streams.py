"""The standard streams as people really have them: closed, cut off, or of an encoding that lacks our letters."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CUT_OFF = 141  # as a shell tells that a program ended when nobody read it any more


def give_streams() -> None:
    """Put the null device in the place of closed streams; a letter that an encoding lacks is replaced in all."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 (as long as the process)
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="replace")


@contextmanager
def until_cut_off() -> Iterator[None]:
    """End the process quietly if nobody reads its output any more, as after ``| head -1``."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)  # for what Python writes out at its end
        for stream in (sys.stdout, sys.stderr):
            os.dup2(null, stream.fileno())
        sys.exit(CUT_OFF)
