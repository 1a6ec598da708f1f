"""Perplexity, or divergence, against stored size, one panel a text: a line a method, and the front that no other row beats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from twofold.comparison.record import Comparison, ComparisonRow
from twofold.report.drawing import INK, label_of
from twofold.report.formats import number
from twofold.report.printed import COLOURS, PRINT, on_paper, save_printed

INK_ON_PAPER = PRINT[INK]
FRONT: dict[str, Any] = {"color": "#bbbbbb", "linewidth": 7, "alpha": 0.6}
PANEL = (6.2, 4.6)  # inches


@dataclass(frozen=True)
class Look:
    """What tells the lines of different methods apart by one field of their rows."""

    field: str
    title: str  # in the legend
    key: str  # the property of a line
    values: tuple[str, ...]
    legend: dict[str, Any]  # the other properties of a line in the legend

    def style(self, i: int) -> dict[str, Any]:
        return {self.key: self.values[i % len(self.values)]}


LOOKS = (
    Look("objective", "objective", "color", COLOURS, {"linewidth": 3}),
    Look("allocate", "allocation", "linestyle", ("-", "--", ":", "-."), {"color": INK_ON_PAPER}),
    Look(
        "refine", "refinement", "marker", ("o", "s", "^", "D", "v", "P", "X"),
        {"color": INK_ON_PAPER, "linestyle": "none"},
    ),
)  # fmt: skip


def draw_front(comparison: Comparison, paths: list[Path]) -> None:
    """Draw the figure into files; their suffixes say how."""
    factored = [row for row in comparison.rows if row.kind == "factored"]
    names = {}  # of the methods that were measured, in the order of the table
    for look in LOOKS:
        measured = {getattr(row, look.field) for row in factored if row.skipped is None}
        order = dict.fromkeys(getattr(row, look.field) for row in factored)
        names[look.field] = [name for name in order if name in measured]
    many = len(comparison.texts)
    with on_paper(comparison.command):
        figure = Figure(figsize=(PANEL[0] * many, PANEL[1]), layout="constrained")
        for i, axes in enumerate(figure.subplots(1, many, squeeze=False)[0]):
            _panel(axes, comparison, i, names)
        figure.legend(handles=_legend(names), loc="outside right upper", frameon=False, fontsize=9)
        save_printed(figure, paths)


def _panel(axes: Any, comparison: Comparison, text: int, names: dict[str, list[str]]) -> None:
    def place(rows: list[ComparisonRow]) -> tuple[list[float], list[float]]:
        shown = [row for row in rows if row.on(text) > 0]  # the divergence of the dense model from itself is not
        return [row.megabytes_16 for row in shown], [row.on(text) for row in shown]

    axes.plot(*place(comparison.front(text)), **FRONT, solid_capstyle="round", zorder=1)
    methods: dict[str, list[ComparisonRow]] = {}
    for row in comparison.measured:
        if row.kind == "factored":
            methods.setdefault(row.method, []).append(row)
    for rows in methods.values():
        ordered = sorted(rows, key=lambda row: row.bytes_16 or 0)
        style: dict[str, Any] = {}
        for look in LOOKS:
            style |= look.style(names[look.field].index(getattr(rows[0], look.field)))
        axes.plot(*place(ordered), **style, linewidth=1.3, markersize=5.5, zorder=2)
    for row in comparison.measured:
        if row.kind != "factored":
            for x, y in zip(*place([row]), strict=True):
                axes.plot(x, y, marker="*" if row.kind == "dense" else "X", color=INK_ON_PAPER, markersize=10, zorder=3)
                axes.annotate(row.name, (x, y), textcoords="offset points", xytext=(7, 5), fontsize=9)
    axes.set_yscale("log")
    _, values = place(comparison.measured)
    wide = max(values, default=1) > 10 * min(values, default=1)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if wide else tuple(range(1, 10)), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2 if value < 10 else 3)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    measure = comparison.measure
    if measure == "divergence":
        measure += f", nats per {comparison.prediction}"
    axes.grid(True)
    axes.margins(x=0.08)
    axes.set(xlabel="the whole model, numbers in 16 bits (MB)", ylabel=measure)
    axes.set_title(label_of(comparison.texts[text].words, 48))


def _legend(names: dict[str, list[str]]) -> list[Any]:
    """Return colours for objectives, lines for allocations, markers for refinements, and the front."""
    handles = []
    for look in LOOKS:
        if names[look.field]:
            handles.append(Line2D([], [], linestyle="none", label=look.title))
        for i, name in enumerate(names[look.field]):
            handles.append(Line2D([], [], **look.style(i), **look.legend, label=name))
    return [*handles, Line2D([], [], **FRONT, label="Pareto front")]
