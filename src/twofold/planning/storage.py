"""What a weight stores at a rank or dense, in numbers or in bytes: the cost that a budget is spent on."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.linalg.gauge import Shaped, order_integers, rank_numbers
from twofold.nn.int_matrix import int_bytes
from twofold.planning.settings import Planning
from twofold.quantize.factors import factor_bytes, integer_form

ORDER_BYTES = 4  # of each integer of an order


@dataclass(frozen=True)
class Storage:
    """How a recipe stores weights, in floating point or in integers of so many bits; a rank of None is a whole weight."""

    recipe: Planning
    element: int  # bytes of a number of floating point
    bits: int | None

    def form(self, weight: Shaped) -> str:
        """Return the form of the factors: as the recipe says, "gauge" if the side is not chosen yet."""
        if self.bits is None:
            return self.recipe.form
        return integer_form(self.recipe.form, self.bits, weight.out_features, weight.in_features)

    def numbers(self, weight: Shaped, rank: int | None) -> int:
        """Return the numbers that are stored."""
        if rank is None:
            return weight.out_features * weight.in_features
        return rank_numbers(self.form(weight), weight, rank)

    def integers(self, weight: Shaped, rank: int | None) -> int:
        """Return the bytes of codes and scales."""
        assert self.bits is not None
        m, n, group = weight.out_features, weight.in_features, self.recipe.group(self.bits)
        if rank is None:
            return int_bytes(m, n, self.bits, group)
        return factor_bytes(self.form(weight), m, n, rank, self.bits, group)

    def bytes(self, weight: Shaped, rank: int | None) -> int:
        """Return the bytes of all that is stored: numbers, order, and the guard of a layer in the dense one's place."""
        element = self.element if rank is not None else getattr(weight, "element_bytes", None) or self.element
        numbers = self.numbers(weight, rank) * element if self.bits is None else self.integers(weight, rank)
        guard = 0 if rank is None and self.bits is None else self.element
        order = 0 if rank is None else ORDER_BYTES * order_integers(self.form(weight), weight)
        return numbers + order + guard

    def cost(self, weight: Shaped, rank: int | None) -> int:
        """Return what is stored in the unit of the budget."""
        return self.bytes(weight, rank) if self.recipe.in_bytes else self.numbers(weight, rank)
