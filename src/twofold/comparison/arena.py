"""The comparison itself: one model, one calibration, a row for every cell of the grid."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twofold.allocate import ALLOCATIONS
from twofold.comparison.cells import only_run
from twofold.comparison.grid import Cell, Grid, make_grid
from twofold.comparison.quantized import choose_baselines
from twofold.comparison.record import Comparison, Row
from twofold.comparison.rows import Rows
from twofold.comparison.shared import Shared, prepare
from twofold.errors import TwofoldError
from twofold.host.clock import machine
from twofold.host.progress import say
from twofold.objectives import OBJECTIVES
from twofold.refine import REFINEMENTS
from twofold.run.check import check_methods
from twofold.run.prepare import plan_of_shapes
from twofold.settings.base import given


def compare(
    grid: Grid | Mapping[str, Any] | str, out: Path | str, *, quiet: bool = False, **settings: Any
) -> Comparison:
    """Compare objectives, allocations, keep ratios and refinements on one model, and write the tables and the figure.

    A comparison that was stopped goes on with its next row, if it is called again with the same settings and folder.

    Args:
        grid: a ``Grid``, its settings, or the name of the model; the settings are objectives, allocate, keep, refine,
            baselines, other_text, eval_windows, and those of a recipe.
        out: the folder of compare.json, compare.csv, compare.md, compare.png, compare.svg and of the finished rows.
        settings: any of a grid, where the model is named.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
    from twofold.comparison.output import write_output  # with matplotlib, which no other command needs at once

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TwofoldError("a comparison runs in one process; start it without a launcher")
    grid = given(Grid, make_grid, grid, settings)
    out = Path(out).expanduser().resolve()
    impossible = check_names(grid)
    baselines, note = choose_baselines(grid.baselines)
    with only_run(out):
        shared = prepare(grid, impossible, quiet=quiet)
        impossible |= _check_sizes(shared, impossible)
        if note is not None:
            shared.notes.append(note)
            if not quiet:
                say(note)
        rows = list(Rows(shared, out, impossible, baselines).all())
        comparison = _record(shared, rows)
        write_output(comparison, out)
        shutil.rmtree(out / "work", ignore_errors=True)
    return comparison


def check_names(grid: Grid) -> dict[Cell, str]:
    """The cells that are impossible whatever the model is, with the reason.

    Raises:
        TwofoldError: if a name is unknown, or a refinement goes with none of the objectives.
    """
    for name in grid.kernels:
        OBJECTIVES.get(name)
    for name in grid.allocate:
        ALLOCATIONS.get(name)
    for chain in grid.chains:
        for name in chain:
            REFINEMENTS.get(name)
    reasons: dict[Cell, str] = {}
    possible = set()
    for cell in grid.cells():
        try:
            check_methods(grid.recipe(cell))
            possible.add(cell.refine)
        except TwofoldError as error:
            reasons[cell] = str(error)
    for cell, reason in reasons.items():
        if cell.refine not in possible:
            raise TwofoldError(reason)
    return reasons


def _check_sizes(shared: Shared, impossible: Mapping[Cell, str]) -> dict[Cell, str]:
    """The cells whose size the model can't have, with the reason.

    Raises:
        TwofoldError: if no cell is left.
    """
    reasons: dict[Cell, str] = {}
    cells = list(shared.grid.cells())
    for keep in shared.grid.keep:  # the shapes alone say it, whatever the rest of the cell is
        some = [cell for cell in cells if cell.keep == keep]
        try:
            plan_of_shapes(shared.loaded, shared.targets, shared.recipe_of(some[0]))
        except TwofoldError as error:
            reasons |= dict.fromkeys(some, str(error))
    if all(cell in reasons or cell in impossible for cell in cells):
        raise TwofoldError(next(iter(reasons.values())) if reasons else impossible[cells[0]])
    return reasons


def _calibrated(rows: list[Row]) -> dict[str, float]:
    """The seconds of the calibration, as the rows of the run that did it tell them."""
    spent = [row.seconds["calibrate"] for row in rows if "calibrate" in row.seconds]
    return {"calibrate": max(spent)} if spent else {}


def _record(shared: Shared, rows: list[Row]) -> Comparison:
    from twofold.report.names import public_name, without_paths

    loaded, data = shared.loaded, shared.data if shared.calibrated else None
    return Comparison(
        command=shared.grid.command(),
        model=public_name(loaded.name),
        machine=machine(loaded.residence.device, loaded.residence.dtype),
        seed=shared.recipe.seed,
        calibration=without_paths(data.samples.source) if data is not None else "none: the weights alone are used",
        calibration_tokens=data.units if data is not None else 0,
        calibration_sha256=data.samples.sha256 if data is not None else "",
        fingerprint=next((row.fingerprint for row in rows if row.fingerprint), ""),
        texts=[text for text, _ in shared.texts],
        rows=rows,
        seconds={**_calibrated(rows), **shared.watch.seconds},
        notes=shared.notes,
    )
