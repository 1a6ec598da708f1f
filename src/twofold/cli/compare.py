"""twofold compare: many factorizations of one model, measured side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import twofold
from twofold.cli.flags import Json, Quiet
from twofold.cli.settings import settings_flags
from twofold.cli.tables import number, plain, print_notes, print_place, print_record, table, tell
from twofold.cli.words import with_flags
from twofold.comparison.grid import Grid, grid_fields, make_grid
from twofold.recipe import Recipe

if TYPE_CHECKING:
    from twofold.comparison.record import Comparison, ComparisonRow


@settings_flags(make_grid, Grid, Recipe, names=grid_fields())
def command(
    grid: Grid,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the tables, the figure and the rows.")],
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure every combination of objectives, allocations, keep ratios and refinements on one calibration.

    A comparison that was stopped goes on with its next row, and one more keep ratio runs its own rows only.
    """
    print_record(twofold.compare(grid, out, quiet=quiet), json_output, partial(print_comparison, out=out))


def print_comparison(comparison: Comparison, out: Path) -> None:
    """Print every row that was measured, those that were not with the reason, and where the files are."""
    texts = comparison.texts
    last = ["divergence"] if comparison.measure == "perplexity" else []

    def shown(row: ComparisonRow, text: int) -> str:
        first, *others = comparison.figures(row, text)
        if last:
            return f"{first:.4g}, {others[0]:.3f} ×"
        names = comparison.measures(text)[1:]
        named = (f"{name.replace('_', ' ')} {score:.4g}" for name, score in zip(names, others, strict=True))
        return ", ".join([f"{first:.4g}", *named])

    table(
        f"{comparison.model}: {comparison.measure} on {', '.join(text.words for text in texts)}",
        ["", "MB", *(text.name for text in texts), *last],
        (
            [
                row.name,
                f"{row.megabytes_16:,.1f}",
                *(shown(row, text) for text in range(len(texts))),
                *([number(row.divergence, ".4f")] if last else []),
            ]
            for row in comparison.measured
        ),
    )
    for reason, names in comparison.skipped.items():
        tell(f"Not measured: {plain('; '.join(names))}: {plain(with_flags(reason))}", wrap=False)
    tell(
        "MB: the whole model, numbers in 16 bits; ×: over the dense model's; divergence: on the first text, nats per token."
        if last
        else f"MB: the whole model, numbers in 16 bits; divergence: nats per {comparison.prediction}.",
    )
    print_notes(comparison.notes)
    print_place("Tables and figure", out / "compare.md")
