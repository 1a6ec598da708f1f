"""What can be factorized in a model, as values: every weight that is a target, and every other with its reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from twofold.model.stacks import stack_of
from twofold.model.structure import Structure

Holder = Literal["", "linear", "transposed", "embedding"]  # a layer that can be made of integers; "" for others
BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")  # the number in a name that tells the block


@dataclass(frozen=True)
class Target:
    """A weight W (m, n) of y = Wx + b that can be factorized."""

    name: str
    out_features: int  # m
    in_features: int  # n
    bias: bool
    transposed: bool  # the module keeps its weight as (in, out)
    element_bytes: int | None = None  # of a stored number; None: as of most of the model's
    stack: str | None = None  # that it stands in, "" outside of all; None: the model has one
    centred: bool = False  # the mean of its inputs is taken off, and goes into the bias

    @property
    def size(self) -> int:
        """m · n."""
        return self.out_features * self.in_features

    def bytes(self, element: int) -> int:
        """Return the bytes of the weight as it is stored, where a number of most weights takes ``element``."""
        return self.size * (self.element_bytes or element)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the parameter, as the module keeps it."""
        return (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)

    @property
    def kind(self) -> str:
        """The last part of the name: q_proj, fc1, …"""
        return self.name.rpartition(".")[2]

    @property
    def alike(self) -> str:
        """The kind, of one stack: what an allocation takes together."""
        return f"{self.stack} {self.kind}" if self.stack else self.kind

    @property
    def layer(self) -> int | None:
        """The number of the block that the weight stands in."""
        return block_of(self.name, self.stack)


@dataclass(frozen=True)
class DenseWeight:
    """A parameter that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str
    layer: Holder = ""  # that holds it
    tied: tuple[str, ...] = ()  # linear layers that use it too
    element_bytes: int | None = None  # of a stored number; None: as of most of the model's

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class UnusedTensor:
    """A tensor in the files that no weight of the model is made of, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Targets:
    """The weights of a model that can be factorized, and all the rest."""

    targets: list[Target]
    dense: list[DenseWeight]
    groups: dict[str, str] = field(default_factory=dict)  # target → the first target that shares its input
    structures: tuple[Structure, ...] = ()  # targets whose sizes are chosen together; if any are, all belong to one
    unused: tuple[UnusedTensor, ...] = ()  # in the files
    stacks: tuple[str, ...] = ()  # of blocks, if the model has several

    def stack_of(self, name: str) -> str | None:
        """Return the stack that a weight stands in, "" outside of all; None if the model has one."""
        return stack_of(name, self.stacks) if self.stacks else None

    def without(self, reasons: dict[str, str]) -> Targets:
        """Leave some targets dense, each for its reason; those that can't be cut without them stay dense too."""
        structures = []
        for structure in self.structures:
            names = [member.name for member in structure.members]
            dropped = [name for name in names if name in reasons]
            rest = structure.less(dropped) if dropped else structure
            if rest is not None:
                structures.append(rest)
            else:
                reasons = {**dict.fromkeys(names, f"cut together with {dropped[0]}, which stays dense"), **reasons}
        left = [t for t in self.targets if t.name not in reasons]
        dense = [
            DenseWeight(
                f"{t.name}.weight",
                t.shape,
                reasons[t.name],
                "transposed" if t.transposed else "linear",
                element_bytes=t.element_bytes,
            )
            for t in self.targets
            if t.name in reasons
        ]
        return replace(self, targets=left, dense=dense + self.dense, structures=tuple(structures))

    @property
    def target_numbers(self) -> int:
        """The parameters of the targeted weights."""
        return sum(target.size for target in self.targets)

    @property
    def total_numbers(self) -> int:
        """The parameters of the whole model, tied ones counted once."""
        return self.target_numbers + sum(weight.size for weight in self.dense)


def block_of(name: str, stack: str | None = None) -> int | None:
    """Return the number in a name that tells the block: the first, or the first in a stack; None if there is none."""
    number = BLOCK.search(name if stack is None else name[len(stack) :]) if stack != "" else None
    return int(number.group(1)) if number else None
