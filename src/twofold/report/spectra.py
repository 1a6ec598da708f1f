"""The spectra with the cut marked: one panel a kind, one line a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from twofold.planning.plan import Plan, PlanEntry
from twofold.report.drawing import PAPER, canvas, depth_colour, inline, label_of, log_scale
from twofold.report.kinds import Group, Loss, Spectra, by_kind

POINTS = 25_000  # of all lines together, so that the page stays small
DECADES = 9  # below the largest value nothing is shown
Limits = tuple[float, float]


def spectra_panels(plan: Plan, spectra: Spectra, loss: Loss) -> list[Markup]:
    """A panel for every kind whose spectra are known; with one scale for all weights, all panels share their limits."""
    groups = [Group(g.label, [e for e in g.entries if _positive(spectra, e, loss) is not None]) for g in by_kind(plan)]
    groups = [group for group in groups if group.entries]
    limits = [_limits(group, spectra, loss) for group in groups]
    if loss.additive and limits:
        limits = [(min(low for low, _ in limits), max(high for _, high in limits))] * len(limits)
    deepest = max((entry.layer or 0 for entry in plan.entries), default=0)
    lines = sum(len(group.entries) for group in groups)
    points = int(np.clip(POINTS // max(lines, 1), 24, 160))
    return [
        spectra_panel(group, spectra, loss, limit, deepest, points) for group, limit in zip(groups, limits, strict=True)
    ]


@inline
def spectra_panel(
    group: Group, spectra: Spectra, loss: Loss, limits: Limits, deepest: int, points: int
) -> tuple[Any, str]:
    """σ² against rank / full rank; the dot is the last component that is kept."""
    figure, axes = canvas(230, 150)
    for entry in group.entries:
        values = _positive(spectra, entry, loss)
        assert values is not None
        at = _sampled(len(values), points)
        colour = depth_colour((entry.layer or 0) / max(deepest, 1))
        axes.plot((at + 1) / len(values), values[at], color=colour, linewidth=0.8, alpha=0.85)
        if entry.rank is not None and 0 < entry.rank <= len(values):
            x, y = entry.rank / len(values), values[entry.rank - 1]
            if y >= limits[0]:
                axes.scatter([x], [y], s=20, color=colour, edgecolors=PAPER, linewidths=0.6, zorder=3)
    axes.set_xlim(0, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    log_scale(axes, "y", *limits)
    axes.set_ylim(limits[0] * 0.7, limits[1] * 1.5)
    axes.grid(True)
    axes.set_title(label_of(group.label, 28), loc="left")
    axes.set_xlabel("rank / full rank")
    axes.set_ylabel("½ σ², nats per token" if loss.additive else "σ²")
    return figure, f"Spectra of {group.label}: {len(group.entries)} weights"


def _positive(spectra: Spectra, entry: PlanEntry, loss: Loss) -> NDArray[np.float64] | None:
    """The values in the unit that is shown, NaN where they are not positive; None if there are none."""
    values = np.asarray(spectra.get(entry.name, ()), dtype=np.float64) * loss.factor
    good = np.isfinite(values) & (values > 0)
    return np.where(good, values, np.nan) if good.any() else None


def _limits(group: Group, spectra: Spectra, loss: Loss) -> Limits:
    every = np.concatenate([v for e in group.entries if (v := _positive(spectra, e, loss)) is not None])
    high = float(np.nanmax(every))
    return max(float(np.nanmin(every)), high * 10.0**-DECADES), high


def _sampled(length: int, points: int) -> NDArray[np.int64]:
    """Places to draw: dense at both ends, where a spectrum bends, and ascending."""
    if length <= points:
        return np.arange(length)
    even = np.linspace(0, 1, points)
    bent = (1 - np.cos(np.pi * even)) / 2
    return np.unique(np.round(bent * (length - 1)).astype(np.int64))
