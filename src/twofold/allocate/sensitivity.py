"""One threshold of the perplexity for all weights, each measured with it alone truncated (ASVD's STRS, Yuan et al. 2023).

Sensitivity-based truncation rank searching, arXiv 2312.05821: for each weight and each share of a grid, the perplexity of the
model in which that weight alone is truncated to the share. Then bisection on a threshold: each weight takes the smallest share
whose perplexity does not exceed it, or stays whole where every share does. The lowest threshold that keeps the budget wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from twofold.allocate import Candidate, Choice, allocation
from twofold.allocate._shares import largest_within
from twofold.allocate.uniform import uniform
from twofold.settings.base import Settings
from twofold.settings.price import Price

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of one weight that are measured


class Sensitivity(Settings):
    """How much text a weight is measured on."""

    TITLE = "Method"

    sensitivity_windows: Annotated[
        int, Field(ge=1, description="calibration windows that each weight is measured on at each share")
    ] = 1


def _measure(measurement: Any) -> Mapping[str, NDArray[np.float64]]:  # (grid,) of each weight
    from twofold.evidence.truncated import perplexities

    return perplexities(measurement, GRID, measurement.settings.part(Sensitivity).sensitivity_windows)


def _seconds(price: Price, settings: Settings) -> float:
    each = len(GRID) * settings.part(Sensitivity).sensitivity_windows * price.measure
    return len(price.figures.targets) * each


@allocation(
    "sensitivity",
    needs={"next token", "whole model", "float numbers"},
    measure=_measure,
    settings=Sensitivity,
    seconds=_seconds,
)
def sensitivity(candidates: list[Candidate], budget: float) -> list[Choice]:
    import numpy as np

    tables = [candidate.measured for candidate in candidates if candidate.measured is not None]
    thresholds = np.unique(np.concatenate(tables))

    def at(threshold: float) -> tuple[list[Choice], float]:
        choices = [within(candidate, threshold) for candidate in candidates]
        return choices, sum(choice.cost(c) for choice, c in zip(choices, candidates, strict=True))

    if at(0.0)[1] <= budget:  # no perplexity is as low, so all are whole
        return at(0.0)[0]
    if at(thresholds[-1])[1] > budget:
        return uniform(candidates, budget)  # below the grid nothing was measured
    low, high = -1, len(thresholds) - 1  # the cost at high keeps the budget, that at low does not
    while high - low > 1:
        middle = (low + high) // 2
        if at(thresholds[middle])[1] <= budget:
            high = middle
        else:
            low = middle
    return at(thresholds[high])[0]


def within(candidate: Candidate, threshold: float) -> Choice:
    """The smallest share of the grid whose perplexity is at most the threshold; dense if there is none."""
    import numpy as np

    assert candidate.measured is not None
    allowed = np.flatnonzero(candidate.measured <= threshold)
    if not len(allowed) and candidate.dense_cost is not None:
        return Choice(None)
    return largest_within(candidate, GRID[int(allowed[0])] if len(allowed) else 1.0)
