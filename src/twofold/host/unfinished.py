"""The unfinished state of a run, beside its output: OUT.partial. A killed run goes on from it; it is removed at the end."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pydantic

from twofold.errors import TwofoldError
from twofold.host import processes
from twofold.host.files import write_text
from twofold.version import __version__

STATE = "state.json"
# Folders of what took long, kept after a failure; of a fine-tuning its checkpoints, not what it chose at the start.
LONG = ("spectra", "checkpoint", "recalibrated", "refine", "tune/checkpoint-*", "tune/last-good")
BEFORE = "before"  # the loss before a fine-tuning, which is measured quickly


class State(pydantic.BaseModel):
    """What a run has told about itself."""

    version: str = __version__
    mark: str = ""  # of the weights, data and settings that it belongs to
    model: str = ""
    stage: str = "begun"
    moments: str = ""  # the folder of the moments
    targets: int = 0  # weights to decompose
    units: int = 0  # parts of the checkpoint to write
    measured: dict[str, dict[str, float | int | None]] = {}  # quality by the plan, where the size is searched for
    process: int = 0
    host: str = ""
    started: float = 0.0  # seconds since 1970
    updated: float = 0.0


def work_folder(out: Path) -> Path:
    """Return where the unfinished state of an output is."""
    return out.with_name(f"{out.name}.partial")


def read_state(folder: Path) -> State | None:
    """Read the state of an unfinished run; None if there is none.

    Raises:
        TwofoldError: if it can't be read.
    """
    if not (folder / STATE).is_file():
        return None
    try:
        return State.model_validate_json((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TwofoldError(f"the state in {folder} can't be read; delete the folder and run again") from error


def is_running(state: State) -> bool:
    """Say whether the process that wrote a state still runs on this machine."""
    if state.host != platform.node() or state.process in (0, os.getpid()):
        return False
    try:
        process = psutil.Process(state.process)
        return bool(process.create_time() <= state.updated + 1)  # else the number was given to another one
    except psutil.Error:
        return False


@dataclass
class Work:
    """The unfinished state of the run that this process does."""

    folder: Path
    state: State = field(default_factory=State)

    def update(self, **changes: object) -> None:
        """Write down how far the run has come."""
        if not processes.is_main():
            return
        self.state = self.state.model_copy(update={**changes, "updated": time.time()})
        write_text(self.folder / STATE, json.dumps(self.state.model_dump(), indent=1) + "\n")

    def belongs_to(self, mark: str) -> None:
        """Make sure that what the folder holds belongs to this model, data and settings.

        Raises:
            TwofoldError: if it does not.
        """
        if self.state.mark not in ("", mark):
            raise TwofoldError(
                f"{self.folder} holds an unfinished run with another model, text, setting or version; finish that one "
                f"with its own command, or remove it: twofold status {self.folder.with_suffix('')} --remove"
            )
        self.update(mark=mark)


@contextmanager
def working(out: Path, model: str) -> Iterator[Work]:
    """Take up or begin the unfinished state of an output; remove it if the block ends well.

    After a failure or a kill, what took long is kept; an empty state is not.

    Raises:
        TwofoldError: if another process works on the same output.
    """
    folder = work_folder(out)
    state = read_state(folder)
    if state is not None and is_running(state) and processes.is_main():
        raise TwofoldError(
            f"the process {state.process} works on {out}; wait for it, stop it, or name another output folder"
        )
    work = Work(folder, state or State(started=time.time()))
    work.update(model=model, process=os.getpid(), host=platform.node())
    processes.wait()
    try:
        yield work
    except BaseException:
        if processes.is_main():
            took_long = any(path.is_file() for pattern in LONG for path in folder.glob(f"{pattern}/**/*"))
            if not took_long and not work.state.measured.keys() - {BEFORE}:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                work.update(process=0)
        raise
    if processes.is_main():
        shutil.rmtree(folder, ignore_errors=True)
