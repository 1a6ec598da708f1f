"""twofold compare: many factorizations of one model, measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofold.cli.settings import grid_flags
from twofold.comparison.grid import Grid


@grid_flags
def command(
    grid: Grid,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the tables, the figure and the rows.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Measure every combination of objectives, allocations, keep ratios and refinements on one calibration.

    A comparison that was stopped goes on with its next row, and one more keep ratio runs its own rows only.
    """
    from twofold.cli.tables import print_comparison
    from twofold.comparison.arena import compare

    comparison = compare(grid, out, quiet=quiet)
    if json_output:
        print(comparison.model_dump_json(indent=1))
    else:
        print_comparison(comparison, out)
