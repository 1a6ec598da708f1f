"""The kept share, and the rank, of every kind in every layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap, to_rgb

from twofold.planning.plan import Plan, PlanEntry
from twofold.report.drawing import PAPER, canvas, inline, label_of, share_colour
from twofold.report.formats import fraction
from twofold.report.kinds import by_layer, kind_labels, stacks_in
from twofold.report.messages import Words

WIDTH, ROW = 960, 26  # pixels
NARROW, WIDE = 9, 46  # pixels of a column


@inline
def rank_heatmap(plan: Plan, words: Words) -> tuple[Any, str]:
    """Draw a row for each kind and a column for each layer: colour is parameters after / before, the number the rank."""
    labels = kind_labels(plan)
    kinds = list(dict.fromkeys(labels.values()))
    layers = [group.label for group in by_layer(plan)]
    cells: dict[tuple[int, int], list[PlanEntry]] = {}
    for column, group in enumerate(by_layer(plan)):
        for entry in group.entries:
            cells.setdefault((kinds.index(labels[entry.name]), column), []).append(entry)
    width = min(max(WIDTH / len(layers), NARROW), WIDE)
    figure, axes = canvas(width * len(layers), ROW * len(kinds))
    shares = np.full((len(kinds), len(layers)), np.nan)
    for place, entries in cells.items():
        shares[place] = fraction(sum(e.numbers_after for e in entries), sum(e.numbers_before for e in entries))
    colours = ListedColormap([share_colour(i / 255) for i in range(256)])
    axes.pcolormesh(np.ma.masked_invalid(shares), cmap=colours, vmin=0, vmax=1, edgecolors=PAPER, linewidth=0.8)
    if width >= 24:
        for (row, column), entries in cells.items():
            axes.text(
                column + 0.5, row + 0.5, rank_words(entries), ha="center", va="center",
                fontsize=10 if width >= 28 else 9, color=contrast(float(shares[row, column])),
            )  # fmt: skip
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(kinds)) + 0.5, [label_of(kind) for kind in kinds])
    step = max(1, round(26 / width))
    places = [i for i in range(len(layers)) if i % step == 0 or layers[i] == "none"]
    axes.set_xticks(
        [i + 0.5 for i in places], [words.told(layers[i]) for i in places], rotation=90 if stacks_in(plan) else 0
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=words.say("layer"), ylabel=words.say("column.kind"))
    return figure, words.say("keeps.figure")


def rank_words(entries: list[PlanEntry]) -> str:
    """Write the rank of a cell: a mean where it holds several weights, = where they stay dense."""
    ranks = [entry.rank for entry in entries if entry.rank is not None]
    if not ranks:
        return "="
    return str(ranks[0]) if len(entries) == 1 else f"~{sum(ranks) / len(ranks):.0f}"


def contrast(value: float) -> str:
    """Return black or white, whichever is read on the colour of a share."""
    red, green, blue = to_rgb(share_colour(value))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
