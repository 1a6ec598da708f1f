"""What a structure is: weights whose sizes are chosen together, since one writes what the other reads, or they share a part."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from twofold.nn.layers._basis import SharedForm
from twofold.nn.layers.sliced import SlicedForm

Pairing = Literal["single", "halves", "neighbours"]  # of the dimensions of a head that rotary embeddings turn together


@dataclass(frozen=True)
class Member:
    """One weight of a structure."""

    name: str
    form: SlicedForm | SharedForm | Literal["gauge", "plain"]  # what of it is kept, or how it is factored
    per_unit: int  # the rows, columns or ranks that one unit is


@dataclass(frozen=True)
class Structure:
    """Weights that are cut together.

    A unit is what is kept or dropped: a hidden unit of an MLP, a dimension of every head of an attention, or a pair of them that
    rotary embeddings turn together. For a weight with dense columns, alone in its structure, it is the storage of a rank; for
    weights with a common basis it is a rank. The last member gives the structure its name, and the plan's losses stand with it.
    """

    kind: str
    members: tuple[Member, ...]
    units: int
    heads: int = 0  # query heads of an attention
    key_heads: int = 0
    watched: str = ""  # the module behind the structure, whose output is checked
    pairing: Pairing = "single"

    @property
    def name(self) -> str:
        return self.members[-1].name

    @property
    def basis(self) -> str | None:
        """The name of the basis that the members store in common, if they do."""
        return None

    @property
    def layers(self) -> int:
        """The number of layers whose losses it holds."""
        return 1

    def words(self, last: bool, dense: bool) -> str:
        """Return what the plan's reason for a member says of the structure."""
        return "" if last else f", together with {self.name}"

    def common_numbers(self, units: int) -> int:
        """Return the numbers that the members store in common, beside their own."""
        return 0

    @property
    def common_integers(self) -> int:
        """The integers that the members store in common."""
        return 0

    def less(self, gone: Collection[str]) -> Structure | None:
        """Return the structure of the members that are left when some stay dense; None if it needs all of them."""
        return None
