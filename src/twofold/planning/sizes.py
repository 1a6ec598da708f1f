"""Budgets: a share of the targeted weights (``keep``), or a size of the whole model (``budget``: 90M, 180MB, 70%)."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.errors import TwofoldError
from twofold.settings.sizes import Unit, parse_budget


@dataclass(frozen=True)
class Budget:
    """What the targeted weights may store, in parameters or in bytes."""

    amount: float
    unit: Unit


@dataclass(frozen=True)
class ModelSize:
    """What a budget is measured against."""

    target_numbers: int  # parameters of the targeted weights
    dense_numbers: int  # parameters of all the rest
    element_bytes: int  # of one parameter on disk
    smallest: float  # parameters of the targets at their smallest possible ranks
    dense_bytes: int | None = None  # of all the rest, where it is not of ``element_bytes`` a parameter


def target_budget(keep: float | None, budget: str | None, size: ModelSize, order_numbers: int = 0) -> Budget:
    """What is left for the targeted weights.

    Args:
        keep: share of the targeted weights, in (0, 1].
        budget: size of the whole model; exactly one of the two is given.
        order_numbers: the integers (of four bytes) that the gauge form adds at the most.

    Raises:
        TwofoldError: if the budget is below what the dense parts and the smallest ranks need; it says the smallest possible.
    """
    if (keep is None) == (budget is None):
        raise TwofoldError("give either `keep` (share of the factorized weights) or `budget` (size of the whole model)")
    if keep is not None:
        if not 0 < keep <= 1:
            raise TwofoldError(f"`keep` must be above 0 and at most 1, got {keep:g}")
        allowed = keep * size.target_numbers
        if allowed < size.smallest:
            least = size.smallest / size.target_numbers
            raise TwofoldError(
                f"`keep={keep:g}` is below the smallest possible, {_up(least, 4):g}: every weight keeps rank 1 at least"
            )
        return Budget(allowed, "parameters")
    assert budget is not None
    number, unit = parse_budget(budget)
    whole = size.target_numbers + size.dense_numbers
    if unit == "share":
        if not 0 < number <= 1:
            raise TwofoldError(f"a budget of {budget} of the whole model must be above 0 and at most 100%")
        number, unit = number * whole, "parameters"
    if unit == "parameters":
        if number < size.dense_numbers + size.smallest:
            least = size.dense_numbers + size.smallest
            raise TwofoldError(
                f"the budget {budget} can't be met: the smallest possible is {_up(least / 1e6, 2):g}M parameters "
                f"({_up(100 * least / whole, 1):g}%), of which {size.dense_numbers / 1e6:.2f}M are in parts that stay dense"
            )
        return Budget(min(number - size.dense_numbers, size.target_numbers), "parameters")
    fixed = size.dense_numbers * size.element_bytes if size.dense_bytes is None else size.dense_bytes
    least = fixed + size.smallest * size.element_bytes + 4 * order_numbers
    if number < least:
        raise TwofoldError(
            f"the budget {budget} can't be met: the smallest possible is {_up(least / 1e6, 2):g}MB, "
            f"of which {fixed / 1e6:.2f}MB are in parts that stay dense"
        )
    return Budget(min(number - fixed, size.target_numbers * size.element_bytes), "bytes")


def _up(value: float, digits: int) -> float:
    """Round up, so that the number that is named is really possible."""
    scale = 10.0**digits
    return float(-(-value * scale // 1) / scale)
