"""The loss that the spectrum predicts for each weight against the loss of the factors that were stored."""

from __future__ import annotations

import math
from typing import Any

from twofold.planning.plan import Plan, PlanEntry
from twofold.report.drawing import INK, PAPER, canvas, depth_colour, inline, log_scale
from twofold.report.kinds import LossScale, depths
from twofold.report.messages import Words

NOISE = 1e-9  # of the largest loss: below it a loss is rounding


def compared(plan: Plan) -> list[tuple[PlanEntry, float, float]]:
    """Find the factorized weights whose predicted and measured losses both stand above the rounding."""
    pairs = [(e, e.predicted_loss or 0.0, e.measured_loss or 0.0) for e in plan.entries if e.rank is not None]
    floor = NOISE * max((max(predicted, measured) for _, predicted, measured in pairs), default=0.0)
    return [pair for pair in pairs if min(pair[1:]) > floor]


@inline
def loss_scatter(plan: Plan, loss: LossScale, words: Words) -> tuple[Any, str]:
    """Draw one dot a weight; on the line both are the same."""
    figure, axes = canvas(340, 300)
    pairs = compared(plan)
    values = [loss.factor * value for pair in pairs for value in pair[1:]]
    low, high = 10.0 ** math.floor(math.log10(min(values))), 10.0 ** math.ceil(math.log10(max(values) * 1.001))
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    deep = depths(entry for entry, _, _ in pairs)
    axes.scatter(
        [loss.factor * predicted for _, predicted, _ in pairs],
        [loss.factor * measured for _, _, measured in pairs],
        c=[depth_colour(deep[entry.name]) for entry, _, _ in pairs],
        s=22, edgecolors=PAPER, linewidths=0.5, zorder=2,
    )  # fmt: skip
    log_scale(axes, "x", low, high)
    log_scale(axes, "y", low, high)
    unit = f"½ Σσ², {loss.unit}" if loss.additive else "Σσ²"
    axes.set(xlabel=f"{words.say('check.x')}\n{unit}", ylabel=f"{words.say('check.y')}\n{unit}")
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.grid(True)
    return figure, words.say("check.figure")
