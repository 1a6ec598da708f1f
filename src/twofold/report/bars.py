"""Bars: parameters before and after by kind, and where the predicted loss sits."""

from __future__ import annotations

from typing import Any

import numpy as np

from twofold.planning.plan import Plan
from twofold.report.drawing import AFTER, BEFORE, canvas, inline, label_of
from twofold.report.formats import fraction
from twofold.report.kinds import Group, LossScale, by_kind, by_layer, stacks_in
from twofold.report.messages import Words

ROW = 30  # pixels


@inline
def size_bars(plan: Plan, words: Words) -> tuple[Any, str]:
    """Draw parameters before and after for every kind, and for all that is no target."""
    rows = [(group.label, group.before, group.after) for group in by_kind(plan)]
    if plan.dense_numbers:
        rows.append((words.say("sizes.rest"), plan.dense_numbers, plan.dense_numbers))
    unit, scale = ("millions", 1e6) if max(before for _, before, _ in rows) >= 1e5 else ("thousands", 1e3)
    figure, axes = canvas(330, ROW * len(rows))
    places = np.arange(len(rows))
    axes.barh(places, [before / scale for _, before, _ in rows], height=0.74, color=BEFORE)
    axes.barh(places, [after / scale for _, _, after in rows], height=0.4, color=AFTER)
    for place, (_, before, after) in zip(places, rows, strict=True):
        share = words.percent(fraction(after, before))
        axes.annotate(share, (before / scale, place), (6, 0), textcoords="offset points", va="center", fontsize=10)
    _name_rows(axes, [label_of(label) for label, _, _ in rows], words.say("sizes.x", unit=words.say(unit)), 6)
    return figure, words.say("sizes.figure")


@inline
def loss_by_kind(plan: Plan, loss: LossScale, words: Words) -> tuple[Any, str]:
    """Draw where the predicted loss sits among the kinds."""
    groups = by_kind(plan)
    figure, axes = canvas(300, max(ROW * len(groups), 120))
    axes.barh(np.arange(len(groups)), _heights(groups, loss), height=0.62, color=AFTER)
    _name_rows(axes, [label_of(group.label, 24) for group in groups], _unit(loss, words), 5)
    return figure, words.say("sits.kind")


def _name_rows(axes: Any, labels: list[str], unit: str, ticks: int) -> None:
    """Name horizontal bars, the first at the top, and give their lengths a scale."""
    axes.set_yticks(np.arange(len(labels)), labels)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=ticks)
    axes.set_xlabel(unit)
    axes.grid(True, axis="x")


@inline
def loss_by_layer(plan: Plan, loss: LossScale, words: Words) -> tuple[Any, str]:
    """Draw where the predicted loss sits along the depth of the model."""
    groups = by_layer(plan)
    figure, axes = canvas(440, 210)
    axes.bar(np.arange(len(groups)), _heights(groups, loss), width=0.72, color=AFTER)
    step = max(1, len(groups) // 14)
    places = [i for i, group in enumerate(groups) if i % step == 0 or group.label == "none"]
    axes.set_xticks(places, [words.told(groups[i].label) for i in places], rotation=90 if stacks_in(plan) else 0)
    axes.tick_params(axis="x", length=0)
    axes.set(xlabel=words.say("layer"), ylabel=_unit(loss, words))
    axes.grid(True, axis="y")
    return figure, words.say("sits.layer")


def _heights(groups: list[Group], loss: LossScale) -> list[float]:
    return [group.shown(loss) * (1e3 if loss.additive else 1e2) for group in groups]


def _unit(loss: LossScale, words: Words) -> str:
    return f"10⁻³ {loss.unit}" if loss.additive else words.say("sits.share")
