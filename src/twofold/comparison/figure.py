"""Perplexity against stored size, one panel a text: a line a method, and the front that no other row beats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from twofold.comparison.record import Comparison, Row
from twofold.report.drawing import INK, label_of
from twofold.report.formats import number
from twofold.report.printed import COLOURS, PRINT, on_paper, save_printed

INK_ON_PAPER = PRINT[INK]
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FRONT = "#bbbbbb"
PANEL = (6.2, 4.6)  # inches


def draw_front(comparison: Comparison, paths: list[Path]) -> None:
    """Draw the figure into files; their suffixes say how."""
    with on_paper(comparison.command):
        save_printed(_figure(comparison), paths)


def _figure(comparison: Comparison) -> Any:
    many = len(comparison.texts)
    figure = Figure(figsize=(PANEL[0] * many, PANEL[1]), layout="constrained")
    panels = figure.subplots(1, many, squeeze=False)[0]
    for i, axes in enumerate(panels):
        _panel(axes, comparison, i)
    figure.legend(handles=_legend(comparison), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _panel(axes: Any, comparison: Comparison, text: int) -> None:
    def place(rows: list[Row]) -> tuple[list[float], list[float]]:
        return [(row.bytes_16 or 0) / 1e6 for row in rows], [row.perplexity[text] for row in rows]

    front = comparison.front(text)
    axes.plot(*place(front), color=FRONT, linewidth=7, solid_capstyle="round", alpha=0.6, zorder=1)
    for rows in _lines(comparison):
        ordered = sorted(rows, key=lambda row: row.bytes_16 or 0)
        axes.plot(*place(ordered), **_style(comparison, rows[0]), linewidth=1.3, markersize=5.5, zorder=2)
    for row in comparison.measured:
        if row.kind == "factored":
            continue
        (x,), (y,) = place([row])
        axes.plot(x, y, marker="*" if row.kind == "dense" else "X", color=INK_ON_PAPER, markersize=10, zorder=3)
        axes.annotate(row.name, (x, y), textcoords="offset points", xytext=(7, 5), fontsize=9)
    axes.set_yscale("log")
    values = [row.perplexity[text] for row in comparison.measured]
    wide = max(values) > 10 * min(values)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if wide else tuple(range(1, 10)), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2 if value < 10 else 3)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True)
    axes.margins(x=0.08)
    axes.set_xlabel("the whole model, numbers in 16 bits (MB)")
    axes.set_ylabel("perplexity")
    axes.set_title(label_of(comparison.texts[text].words, 48))


def _lines(comparison: Comparison) -> list[list[Row]]:
    """The factored rows that were measured, by method."""
    methods: dict[str, list[Row]] = {}
    for row in comparison.measured:
        if row.kind == "factored":
            methods.setdefault(row.method, []).append(row)
    return list(methods.values())


def _kinds(comparison: Comparison) -> tuple[list[str], list[str], list[str]]:
    """The objectives, allocations and refinements that were measured, in the order of the table."""
    rows = [row for row in comparison.rows if row.kind == "factored"]
    kinds = []
    for part in ("objective", "allocate", "refine"):
        seen = {getattr(row, part) for row in rows if row.skipped is None}
        kinds.append([str(name) for name in dict.fromkeys(getattr(row, part) for row in rows) if name in seen])
    return kinds[0], kinds[1], kinds[2]


def _style(comparison: Comparison, row: Row) -> dict[str, Any]:
    objectives, allocations, refinements = _kinds(comparison)
    return {
        "color": COLOURS[objectives.index(str(row.objective)) % len(COLOURS)],
        "linestyle": STYLES[allocations.index(str(row.allocate)) % len(STYLES)],
        "marker": MARKERS[refinements.index(str(row.refine)) % len(MARKERS)],
    }


def _legend(comparison: Comparison) -> list[Any]:
    """Colours for objectives, lines for allocations, markers for refinements."""
    objectives, allocations, refinements = _kinds(comparison)
    ink = INK_ON_PAPER

    def head(words: str) -> Any:
        return Line2D([], [], linestyle="none", label=words)

    handles = [head("objective")] if objectives else []
    handles += [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=n) for i, n in enumerate(objectives)]
    handles += [head("allocation")] if allocations else []
    handles += [
        Line2D([], [], color=ink, linestyle=STYLES[i % len(STYLES)], label=n) for i, n in enumerate(allocations)
    ]
    handles += [head("refinement")] if refinements else []
    handles += [
        Line2D([], [], color=ink, marker=MARKERS[i % len(MARKERS)], linestyle="none", label=name)
        for i, name in enumerate(refinements)
    ]
    return [*handles, Line2D([], [], color=FRONT, linewidth=7, alpha=0.6, label="Pareto front")]
