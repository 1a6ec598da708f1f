"""One threshold of the perplexity for all weights, each measured with it alone truncated (ASVD's STRS, Yuan et al. 2023).

Sensitivity-based truncation rank searching, arXiv 2312.05821: for each weight and each share of a grid, the perplexity of the
model in which that weight alone is truncated to the share. Then bisection on a threshold: each weight takes the smallest share
whose perplexity does not exceed it, or stays whole where every share does. The lowest threshold that keeps the budget wins.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Annotated, Any

from pydantic import Field

from twofold.allocate import Candidate, Choice, Measured, allocation, total_cost
from twofold.allocate._shares import largest_within
from twofold.allocate.uniform import uniform
from twofold.settings.base import Settings
from twofold.settings.price import Price

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of one weight that are measured


class Sensitivity(Settings):
    """How much text a weight is measured on."""

    TITLE = "Method"

    sensitivity_windows: Annotated[
        int, Field(ge=1, description="calibration windows that each weight is measured on at each share")
    ] = 1


def _measure(measurement: Any) -> Measured:  # (grid,) of each weight
    from twofold.evidence.truncated import perplexities

    return perplexities(measurement, GRID, measurement.settings.part(Sensitivity).sensitivity_windows)


def _seconds(price: Price, settings: Settings) -> float:
    windows = settings.part(Sensitivity).sensitivity_windows
    return len(price.figures.targets) * (len(GRID) * windows * price.measure)


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
    thresholds = np.unique(np.concatenate(tables)).tolist()

    def at(threshold: float) -> list[Choice]:
        return [within(candidate, threshold) for candidate in candidates]

    def fits(threshold: float) -> bool:
        return total_cost(candidates, at(threshold)) <= budget

    if fits(0.0):  # no perplexity is as low, so all are whole
        return at(0.0)
    if not fits(thresholds[-1]):
        return uniform(candidates, budget)  # below the grid nothing was measured
    return at(thresholds[bisect_left(thresholds, True, key=fits)])  # a higher threshold costs less


def within(candidate: Candidate, threshold: float) -> Choice:
    """Choose the smallest share of the grid whose perplexity is at most the threshold; dense if there is none."""
    import numpy as np

    assert candidate.measured is not None
    allowed = np.flatnonzero(candidate.measured <= threshold)
    if not len(allowed) and candidate.dense_cost is not None:
        return Choice(None)
    return largest_within(candidate, GRID[int(allowed[0])] if len(allowed) else 1.0)
