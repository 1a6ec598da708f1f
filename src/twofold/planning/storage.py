"""What a weight stores at a rank or dense, in numbers or in bytes: the cost that a budget is spent on."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.linalg.storage import Shaped, order_integers, rank_numbers
from twofold.nn.int_matrix import int_bytes
from twofold.planning.settings import Planning
from twofold.quantize.factors import factor_bytes, integer_form

ORDER_BYTES = 4  # of each integer of an order


@dataclass(frozen=True)
class Storage:
    """How the factors of a recipe are stored: in floating point, or in integers of so many bits."""

    recipe: Planning
    element: int  # bytes of a number of floating point
    bits: int | None

    def form(self, weight: Shaped) -> str:
        """The form of the factors: as the recipe says, "gauge" if the side is not chosen yet."""
        if self.bits is None:
            return self.recipe.form
        return integer_form(self.recipe.form, self.bits, weight.out_features, weight.in_features)

    def numbers(self, weight: Shaped, rank: int) -> int:
        return rank_numbers(self.form(weight), weight, rank)

    def integers(self, weight: Shaped, rank: int) -> int:
        """The bytes of codes and scales of a rank."""
        assert self.bits is not None
        group = self.recipe.group(self.bits)
        return factor_bytes(self.form(weight), weight.out_features, weight.in_features, rank, self.bits, group)

    def bytes(self, weight: Shaped, rank: int) -> int:
        """All that a rank stores: numbers, order and guard."""
        form = self.form(weight)
        numbers = self.numbers(weight, rank) * self.element if self.bits is None else self.integers(weight, rank)
        return numbers + ORDER_BYTES * order_integers(form, weight) + self.element


def dense_integers(weight: Shaped, bits: int, group: int | None) -> int:
    """The bytes of codes and scales of a whole weight."""
    return int_bytes(weight.out_features, weight.in_features, bits, group)
