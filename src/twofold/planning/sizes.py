"""Budgets: a share of the targeted weights (``keep``), or a size of the whole model (``budget``: 90M, 180MB, 70%)."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.errors import TwofoldError
from twofold.settings.sizes import parse_budget


@dataclass(frozen=True)
class ModelSize:
    """What a budget is measured against."""

    target_numbers: int  # parameters of the targeted weights
    dense_numbers: int  # parameters of all the rest
    target_bytes: int  # of the targeted weights on disk
    dense_bytes: int  # of all the rest
    smallest: float  # what the targets store at their smallest possible ranks, in the unit of the budget


def target_budget(keep: float | None, budget: str | None, size: ModelSize) -> float:
    """Return the parameters, or the bytes of a budget in bytes, that are left for the targeted weights.

    Args:
        keep: share of the targeted weights, in (0, 1].
        budget: size of the whole model; exactly one of the two is given.

    Raises:
        TwofoldError: if the budget is below what the dense parts and the smallest ranks need; it says the smallest possible.
    """
    if (keep is None) == (budget is None):
        raise TwofoldError("give either `keep` (share of the factorized weights) or `budget` (size of the whole model)")
    if keep is not None:
        if not 0 < keep <= 1:
            raise TwofoldError(f"`keep` must be above 0 and at most 1, got {keep:g}")
        if keep * size.target_numbers < size.smallest:
            least = _up(size.smallest / size.target_numbers, 4)
            raise TwofoldError(
                f"`keep={keep:g}` is below the smallest possible, {least:g}: every weight keeps rank 1 at least"
            )
        return keep * size.target_numbers
    assert budget is not None
    number, unit = parse_budget(budget)
    whole = size.target_numbers + size.dense_numbers
    if unit == "share":
        if not 0 < number <= 1:
            raise TwofoldError(f"a budget of {budget} of the whole model must be above 0 and at most 100%")
        number *= whole
    if unit == "bytes":
        dense, targets, name, share = size.dense_bytes, size.target_bytes, "MB", ""
    else:
        dense, targets, name = size.dense_numbers, size.target_numbers, "M"
        share = f" parameters ({_up(100 * (dense + size.smallest) / whole, 1):g}%)"
    if number < dense + size.smallest:
        raise TwofoldError(
            f"the budget {budget} can't be met: the smallest possible is {_up((dense + size.smallest) / 1e6, 2):g}{name}"
            f"{share}, of which {dense / 1e6:.2f}{name} are in parts that stay dense"
        )
    return min(number - dense, targets)


def _up(value: float, digits: int) -> float:
    """Round up, so that the number that is named is really possible."""
    scale = 10.0**digits
    return float(-(-value * scale // 1) / scale)
