"""The spectra with the cut marked: one panel a kind, one line a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from twofold.planning.plan import Plan, PlanEntry
from twofold.report.drawing import PAPER, canvas, depth_colour, inline, label_of, log_scale
from twofold.report.kinds import LossScale, SpectraValues, by_kind, depths
from twofold.report.messages import Words

POINTS = 25_000  # of all lines together, so that the page stays small
DECADES = 9  # below the largest value nothing is shown
Limits = tuple[float, float]


def spectra_panels(plan: Plan, spectra: SpectraValues, loss: LossScale, words: Words) -> list[Markup]:
    """Draw a panel for every kind whose spectra are known; with one scale for all weights, all panels share their limits."""
    lines = {}  # the values in the unit that is shown, NaN where they are not positive
    for entry in plan.entries:
        values = np.asarray(spectra.get(entry.name, ()), dtype=np.float64) * loss.factor
        positive = np.isfinite(values) & (values > 0)
        if positive.any():
            lines[entry.name] = np.where(positive, values, np.nan)
    kinds = {group.label: [e for e in group.entries if e.name in lines] for group in by_kind(plan)}
    kinds = {label: entries for label, entries in kinds.items() if entries}
    limits = [_limits(np.concatenate([lines[e.name] for e in entries])) for entries in kinds.values()]
    if loss.additive and limits:
        limits = [(min(low for low, _ in limits), max(high for _, high in limits))] * len(limits)
    deep = depths(plan.entries)
    points = int(np.clip(POINTS // max(len(lines), 1), 24, 160))
    unit = f"½ σ², {loss.unit}" if loss.additive else "σ²"
    return [
        _panel(label, entries, lines, limit, deep, points, unit, words)
        for (label, entries), limit in zip(kinds.items(), limits, strict=True)
    ]


@inline
def _panel(
    label: str,
    entries: list[PlanEntry],
    lines: dict[str, NDArray[np.float64]],
    limits: Limits,
    deep: dict[str, float],
    points: int,
    unit: str,
    words: Words,
) -> tuple[Any, str]:
    """Draw σ² against rank / full rank; the dot is the last component that is kept."""
    figure, axes = canvas(230, 150)
    for entry in entries:
        values = lines[entry.name]
        at = _sampled(len(values), points)
        colour = depth_colour(deep[entry.name])
        axes.plot((at + 1) / len(values), values[at], color=colour, linewidth=0.8, alpha=0.85)
        if entry.rank is not None and 0 < entry.rank <= len(values):
            x, y = entry.rank / len(values), values[entry.rank - 1]
            if y >= limits[0]:
                axes.scatter([x], [y], s=20, color=colour, edgecolors=PAPER, linewidths=0.6, zorder=3)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    log_scale(axes, "y", *limits)
    axes.set(xlim=(0, 1.02), ylim=(limits[0] * 0.7, limits[1] * 1.5), xlabel=words.say("spectra.x"), ylabel=unit)
    axes.grid(True)
    axes.set_title(label_of(label, 28), loc="left")
    return figure, words.say("spectra.figure", kind=label, weights=len(entries))


def _limits(values: NDArray[np.float64]) -> Limits:
    high = float(np.nanmax(values))
    return max(float(np.nanmin(values)), high * 10.0**-DECADES), high


def _sampled(length: int, points: int) -> NDArray[np.int64]:
    """Return the places to draw: dense at both ends, where a spectrum bends, and ascending."""
    if length <= points:
        return np.arange(length)
    bent = (1 - np.cos(np.pi * np.linspace(0, 1, points))) / 2
    return np.unique(np.round(bent * (length - 1)).astype(np.int64))
