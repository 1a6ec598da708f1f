"""What a sweep over stretches of blocks keeps: the states between them, the finished parts, and an unfinished pass."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from twofold.calibrate.activations import Activations
from twofold.calibrate.statistics import BACKWARD, FORWARD
from twofold.host import processes
from twofold.host.parts import Parts, take_part, write_part
from twofold.model.blocks import Stretch

FILES = re.compile(  # that a sweep writes
    r"(forward|backward|both)-\d+-\d+\.safetensors|\.progress\.\d+\.safetensors|(hidden|gradient)-\d+\.\d+\.state|\..*\.\d+\.tmp"
)
# The kinds of moments that a sweep gives.
KINDS = {"forward": FORWARD, "backward": BACKWARD, "both": FORWARD + BACKWARD}


@dataclass(frozen=True)
class SweepStep:
    """One sweep over one stretch of blocks."""

    sweep: Literal["forward", "backward", "both"]
    stretch: Stretch

    @property
    def name(self) -> str:
        """The name of the file that keeps its sums, without the ending."""
        return f"{self.sweep}-{self.stretch.first:04d}-{self.stretch.last:04d}"

    @property
    def writes(self) -> list[tuple[str, int]]:
        """The states that it leaves for others, by kind and block."""
        if self.sweep == "forward":
            return [] if self.stretch.is_last else [("hidden", self.stretch.last)]
        return [] if self.stretch.is_first else [("gradient", self.stretch.first)]

    @property
    def reads(self) -> list[tuple[str, int]]:
        """The states that it needs."""
        reads = [] if self.stretch.is_first else [("hidden", self.stretch.first)]
        return [*reads, ("gradient", self.stretch.last)] if self.sweep == "backward" else reads


def steps_of(parts: list[Stretch], backward: bool) -> list[SweepStep]:
    """Return the steps in their order: forward from the first stretch on, and backward from the last."""
    if not backward:
        return [SweepStep("forward", part) for part in parts]
    *others, last = parts
    forward = [SweepStep("forward", part) for part in others]
    return [*forward, SweepStep("both", last), *(SweepStep("backward", part) for part in reversed(others))]


@dataclass
class States:
    """The states of the samples of this process, in memory or in a folder.

    Args:
        count: the samples of this process.
        fingerprint: what the files belong to.
        folder: of finished parts, and of an unfinished pass; None keeps nothing.
        on_disk: whether hidden states are kept there too.
    """

    steps: list[SweepStep]
    count: int
    fingerprint: str
    folder: Path | None
    on_disk: bool
    done: int = 0  # samples of the first step that are summed already
    sums: dict[str, Tensor] = field(default_factory=dict)  # of these samples
    _activations: dict[str, Activations] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.way = f"{processes.world()} processes" + (", hidden states on disk" if self.on_disk else "")
        self.disk = self.folder if self.on_disk else None
        progress = f".progress.{processes.rank()}.safetensors"
        self.unfinished = None if self.folder is None else self.folder / progress  # the sums of an unfinished step

    def of(self, kind: str, place: int) -> Activations:
        """Return the hidden states (or gradients) that go into a block."""
        name = f"{kind}-{place:04d}"
        if name not in self._activations:
            path = None if self.disk is None else self.disk / f"{name}.{processes.rank()}.state"
            self._activations[name] = Activations(self.count, path)
        return self._activations[name]

    def resume(self) -> int:
        """Find the step to begin with, and what is left of it."""
        if self.folder is None or (self.disk is None and len(self.steps) > 1):  # else the hidden states were in memory
            return 0
        begin = 0
        for step in self.steps:
            part = self._take(self._part(step))
            if part is None:
                break
            self._shaped(step, part[1])
            begin += 1
        begin = processes.least(begin)
        left = [state for step in self.steps[:begin] for state in step.writes]
        needed = [state for step in self.steps[begin:] for state in step.reads if state in left]
        if not processes.agree(all(self.of(*state).whole(self.count) for state in needed)):
            begin = 0
        part = self._take(self.unfinished)
        mine = part is not None and begin < len(self.steps) and part[1]["step"] == self.steps[begin].name
        if not processes.agree(mine) or part is None:
            return begin
        sums, about = part
        self._shaped(self.steps[begin], about)
        done = int(about["windows"])
        if processes.agree(all(self.of(*state).whole(done) for state in self.steps[begin].writes)):
            self.done, self.sums = done, dict(sums)
        return begin

    def save(self, sums: dict[str, Tensor], about: dict[str, str], done: int) -> None:
        """Keep what an unfinished step has summed of its first samples."""
        if self.unfinished is not None:
            write_part(self.unfinished, sums, self.fingerprint, {"way": self.way, **about, "windows": str(done)})

    def finish(self, step: SweepStep, sums: dict[str, Tensor], about: dict[str, str], *, backward: bool) -> None:
        """Keep the sums of a step, and remove what no later step reads."""
        if self.folder is not None and processes.is_main():
            write_part(self._part(step), sums, self.fingerprint, {"way": self.way, **about})
        processes.wait()
        if step.sweep != "forward" or not backward:
            self.of("hidden", step.stretch.first).remove()
        if step.sweep == "backward":
            self.of("gradient", step.stretch.last).remove()
        if self.unfinished is not None:
            self.unfinished.unlink(missing_ok=True)

    def clean(self) -> list[str]:
        """Remove what finished and abandoned passes left in the folder, but nothing of another name; return the parts."""
        assert self.folder is not None
        parts = [self._part(step).name for step in self.steps]
        for path in self.folder.iterdir():
            if FILES.fullmatch(path.name) and path.name not in parts:
                path.unlink(missing_ok=True)
        return parts

    def _part(self, step: SweepStep) -> Path:
        assert self.folder is not None
        return self.folder / f"{step.name}.safetensors"

    def _shaped(self, step: SweepStep, about: dict[str, str]) -> None:
        """Tell the states that an earlier process left what they hold."""
        for state in step.writes:
            if about["shape"]:
                self.of(*state).shaped(tuple(json.loads(about["shape"])), getattr(torch, about["dtype"]))

    def _take(self, path: Path | None) -> tuple[Parts, dict[str, str]] | None:
        """Return a part and its header; None if it is not whole, of something else, or made in another way."""
        part = take_part(path, self.fingerprint)
        return part if part is not None and part[1].get("way") == self.way else None
