"""What a method costs, made of the sizes of a model and the speeds of this machine: memory in bytes, and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

GRADIENTS = 1.25  # time of a pass that gives weights gradients too, over that of a calibration pass


class Shape(Protocol):
    """A weight (m, n)."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Figures:
    """The sizes that memory and time depend on; numbers, not bytes, where nothing else is said."""

    numbers: int  # of the whole model
    block: int  # of the largest block
    blocks: int
    table: int  # the larger of the input embedding and the output head
    outside: int  # what stands in no block and is no table
    vocabulary: int
    targets: Sequence[Shape]
    block_targets: Sequence[Shape]  # those of the block with the most
    request: dict[str, int]  # kind of moment → numbers of the whole model
    block_request: dict[str, int]  # the same of one block
    element: int  # bytes of a number in computation
    stored: int  # bytes of a number on disk
    backward: bool

    @property
    def width(self) -> int:
        """The numbers of a hidden state."""
        return self.table // max(self.vocabulary, 1)


@dataclass(frozen=True)
class Speeds:
    """Seconds of one block on one batch of the calibration, on this machine."""

    forward: float  # with the hooks that collect moments
    both: float  # forward and backward, with the hooks
    head: float  # of the output layer with the loss and its gradient
    head_forward: float  # of the output layer alone, on one window that is measured
    decompose: float  # of a block's weights
    factorize: float  # of a block's weights
    batch: int  # tokens of the batch


NO_SPEEDS = Speeds(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1)  # of a machine that was not probed


@dataclass(frozen=True)
class Price:
    """What the price of a method is made of."""

    figures: Figures
    speeds: Speeds
    batches: int  # of the calibration
    window: int  # tokens of a calibration window
    kept: float  # share of the targets' numbers that is left, as far as it is known

    @property
    def blocks(self) -> int:
        return max(self.figures.blocks, 1)

    @property
    def measure(self) -> float:
        """Seconds to measure one calibration window."""
        speeds = self.speeds
        return self.blocks * speeds.forward * self.window / speeds.batch + speeds.head_forward

    @property
    def sweep(self) -> float:
        """Seconds of a pass forward and backward over the calibration text, as a calibration makes it."""
        return self.batches * (self.blocks * self.speeds.both + self.speeds.head)

    @property
    def predict(self) -> float:
        """Seconds of a pass forward over the calibration text, with the output layer."""
        return self.batches * (self.blocks * self.speeds.forward + self.speeds.head_forward)

    @property
    def learn(self) -> float:
        """Seconds of a pass over the calibration text that gives weights gradients."""
        return self.batches * (self.blocks * self.speeds.both * GRADIENTS + self.speeds.head)

    @property
    def trained(self) -> float:
        """The numbers that are left of the targets."""
        return self.kept * sum(target.size for target in self.figures.targets)

    @property
    def gradient(self) -> int:
        """The numbers of gradients of all targets, and of moments of both their sides as if none were shared."""
        return sum(t.size + t.out_features**2 + t.in_features**2 for t in self.figures.targets)
