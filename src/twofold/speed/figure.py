"""The roofline: what each model reaches of what the machine can do, by multiplications for each byte that it moves."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from twofold.report.drawing import INK, label_of
from twofold.report.printed import COLOURS, PRINT, on_paper, save_printed
from twofold.speed.record import Bench, Row

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw_roofline(bench: Bench, paths: list[Path]) -> None:
    """Draw the figure into files; their suffixes say how."""
    with on_paper("roofline"):
        save_printed(_figure(bench), paths)


def points(bench: Bench, row: Row) -> dict[str, tuple[float, float]]:
    """Return operations for each byte, and operations a second; two for each multiplication. Empty if the work is not known."""
    work = row.work
    if work is None:
        return {}
    context = bench.prompt + bench.new / 2
    reached = {}
    for batch, timing in row.decode.items():
        operations = 2 * work.decode_multiplications(batch, context)
        seconds = timing.median / bench.new
        reached[f"decode {batch}"] = operations / work.decode_bytes(batch, context), operations / seconds
    operations = 2 * work.prefill_multiplications(bench.prefill)
    moved = work.weight_bytes + bench.prefill * work.cache_bytes
    reached[f"prefill {bench.prefill}"] = operations / moved, operations / row.prefill.median
    return reached


def _figure(bench: Bench) -> Any:
    figure = Figure(figsize=(7.0, 4.8), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(dict.fromkeys(row.runtime for row in bench.rows), cycle(COLOURS)))
    markers = dict(zip(dict.fromkeys(row.model for row in bench.rows), cycle(MARKERS)))
    ink = PRINT[INK]
    places: dict[str, tuple[float, float]] = {}
    style: dict[str, Any]
    for row in bench.rows:
        reached, colour = points(bench, row), colours[row.runtime]
        style = {"marker": markers[row.model], "markerfacecolor": "white" if row.original else colour}
        for x, y in reached.values():
            axes.plot(x, y / 1e9, color=colour, markersize=8, linestyle="none", **style)
        places |= reached
    for what, (x, y) in places.items():
        axes.annotate(what, (x, y / 1e9), textcoords="offset points", xytext=(8, -12), fontsize=9)
    roofs, ridge = bench.roofs, bench.roofs.flops / bench.roofs.bytes_per_second
    xs = [x for x, _ in places.values()] or [1.0]
    line = np.geomspace(min(*xs, ridge) / 3, max(*xs, ridge) * 3, 200)
    axes.plot(line, np.minimum(line * roofs.bytes_per_second, roofs.flops) / 1e9, color=ink, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="operations for each byte moved", ylabel="operations a second (10⁹)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    title = f"{roofs.bytes_per_second / 1e9:.0f} GB and {roofs.flops / 1e9:.0f} · 10⁹ operations a second, as measured"
    axes.set_title(title, fontsize=10, fontweight="normal", loc="left")
    axes.grid(True)
    handles = [Line2D([], [], color=colour, linewidth=3, label=runtime) for runtime, colour in colours.items()]
    hollow = {row.model for row in bench.rows if row.original}
    for model, marker in markers.items():
        style = {"marker": marker, "markerfacecolor": "white" if model in hollow else ink}
        handles.append(Line2D([], [], color=ink, linestyle="none", label=label_of(model, 40), **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
