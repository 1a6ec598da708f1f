"""The roofline: what each model reaches of what the machine can do, by multiplications for each byte that it moves."""

from __future__ import annotations

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
SIZE = (7.0, 4.8)  # inches


def draw_roofline(bench: Bench, paths: list[Path]) -> None:
    """Draw the figure into files; their suffixes say how."""
    with on_paper("roofline"):
        save_printed(_figure(bench), paths)


def points(bench: Bench, row: Row) -> dict[str, tuple[float, float]]:
    """Operations for each byte, and operations a second: two for each multiplication. Empty if the work is not known."""
    work = row.work
    if work is None:
        return {}
    context = bench.prompt + bench.new / 2
    found = {}
    for batch, timing in row.decode.items():
        operations = 2 * work.decode_multiplications(batch, context)
        seconds = timing.median / bench.new
        found[f"decode {batch}"] = operations / work.decode_bytes(batch, context), operations / seconds
    operations = 2 * work.prefill_multiplications(bench.prefill)
    moved = work.weight_bytes + bench.prefill * work.cache_bytes
    found[f"prefill {bench.prefill}"] = operations / moved, operations / row.prefill.median
    return found


def _figure(bench: Bench) -> Any:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    placed = [points(bench, row) for row in bench.rows]
    runtimes = list(dict.fromkeys(row.runtime for row in bench.rows))
    models = list(dict.fromkeys(row.model for row in bench.rows))
    ink = PRINT[INK]
    for row, found in zip(bench.rows, placed, strict=True):
        colour, marker = COLOURS[runtimes.index(row.runtime) % len(COLOURS)], MARKERS[models.index(row.model) % 7]
        for x, y in found.values():
            face = "white" if row.original else colour
            axes.plot(x, y / 1e9, marker=marker, color=colour, markerfacecolor=face, markersize=8, linestyle="none")
    places = {what: at for found in placed for what, at in found.items()}
    for what, (x, y) in places.items():
        axes.annotate(what, (x, y / 1e9), textcoords="offset points", xytext=(8, -12), fontsize=9)
    roofs, ridge = bench.roofs, bench.roofs.flops / bench.roofs.bytes_per_second
    xs = [x for x, _ in places.values()] or [1.0]
    line = np.geomspace(min(*xs, ridge) / 3, max(*xs, ridge) * 3, 200)
    roof = np.minimum(line * roofs.bytes_per_second, roofs.flops) / 1e9
    axes.plot(line, roof, color=ink, linewidth=1.2)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("operations for each byte moved")
    axes.set_ylabel("operations a second (10⁹)")
    title = f"{roofs.bytes_per_second / 1e9:.0f} GB and {roofs.flops / 1e9:.0f} · 10⁹ operations a second, as measured"
    axes.set_title(title, fontsize=10, fontweight="normal", loc="left")
    axes.grid(True)
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=n) for i, n in enumerate(runtimes)]
    hollow = {row.model for row in bench.rows if row.original}
    handles += [
        Line2D(
            [],
            [],
            color=ink,
            marker=MARKERS[i % 7],
            linestyle="none",
            label=label_of(name, 40),
            markerfacecolor="white" if name in hollow else ink,
        )
        for i, name in enumerate(models)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
