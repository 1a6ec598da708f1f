"""Size against quality of several runs: a numbered point a run, and the front that no other run beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from twofold.report.drawing import INK, PAPER, canvas, inline
from twofold.report.messages import Words
from twofold.report.runs import Panel

WIDTH, HEIGHT = 370, 260  # pixels
NEAR = 15  # pixels: points that are closer share a label
WIDE = 5  # from so many times the least on, the measure's scale is logarithmic
Point = tuple[int, float, float]  # the number of a run, megabytes, measure


@inline
def runs_front(panel: Panel, unit: str, words: Words) -> tuple[Any, str]:
    """Draw the runs of a panel: filled points on a line are the front, hollow ones lie behind it.

    Args:
        unit: of a divergence.
    """
    figure, axes = canvas(WIDTH, HEIGHT)
    points = [(number, size / 1e6, value) for number, (size, value) in panel.points.items()]
    of = {point[0]: point for point in points}
    line = [of[number] for number in panel.front]
    axes.plot([x for _, x, _ in line], [y for _, _, y in line], color=INK, linewidth=1.2, zorder=1)
    for number, x, y in points:
        inside = INK if number in panel.front else PAPER
        axes.plot(x, y, marker="o", markersize=8, color=inside, markeredgecolor=INK, markeredgewidth=1.4, zorder=2)
    _scale(axes, points, words)
    for x, y, label in _labels(axes, points):
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(7, 6), fontsize=11, color=INK, zorder=3)
    axes.grid(True)
    axes.set(xlabel=words.say("runs.axis.size"), ylabel=words.say(f"runs.axis.{panel.measure}", unit=unit))
    told = "; ".join(
        words.say("runs.point", number=number, size=words.megabytes(1e6 * x), value=words.number(y))
        for number, x, y in points
    )
    return figure, f"{words.say(f'runs.figure.{panel.measure}')}: {told}"


def _scale(axes: Any, points: Sequence[Point], words: Words) -> None:
    values = [y for _, _, y in points]
    axes.margins(x=0.12, y=0.15)
    for axis, held in ((axes.xaxis, [x for _, x, _ in points]), (axes.yaxis, values)):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _, digits=_digits(held): words.number(value, digits)))
    if min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")
        subs = (1, 2, 5) if max(values) < 1000 * min(values) else (1,)
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.number(value, 1)))


def _digits(values: Sequence[float]) -> int:
    """Return how many significant digits tell the ticks of an axis apart."""
    span = max(values) - min(values)
    return 2 if span <= 0 else min(max(math.ceil(math.log10(max(values) / span)) + 2, 2), 6)


def _labels(axes: Any, points: Sequence[Point]) -> list[tuple[float, float, str]]:
    """Return where labels stand and what they say; points that lie on one another have one together."""
    places = axes.transData.transform([(x, y) for _, x, y in points])
    labels: list[tuple[int, list[int]]] = []  # the place of the first, the numbers of all
    for i, (number, _, _) in enumerate(points):
        near = next((numbers for first, numbers in labels if math.dist(places[first], places[i]) < NEAR), None)
        if near is None:
            labels.append((i, [number]))
        else:
            near.append(number)
    return [(points[i][1], points[i][2], ", ".join(map(str, numbers))) for i, numbers in labels]
