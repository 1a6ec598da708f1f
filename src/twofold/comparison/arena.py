"""The comparison itself: one model, one calibration, a row for every cell of the grid, and the files, all or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from twofold.allocate import ALLOCATIONS
from twofold.comparison.cells import only_run
from twofold.comparison.figure import draw_front
from twofold.comparison.grid import Cell, Grid, make_grid
from twofold.comparison.quantized import choose_baselines
from twofold.comparison.record import Comparison, ComparisonRow
from twofold.comparison.rows import GridRunner
from twofold.comparison.shared import GridSetup, set_up
from twofold.comparison.tables import csv_table, markdown
from twofold.errors import TwofoldError
from twofold.host.clock import machine
from twofold.host.faults import decorating
from twofold.host.progress import say
from twofold.objectives import OBJECTIVES
from twofold.refine import REFINEMENTS
from twofold.report.names import public_name, without_paths
from twofold.run.check import check_methods
from twofold.run.prepare import plan_of_shapes
from twofold.settings.base import from_call


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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TwofoldError("a comparison runs in one process; start it without a launcher")
    grid = from_call(Grid, make_grid, grid, settings)
    out = Path(out).expanduser().resolve()
    impossible = check_names(grid)
    baselines, note = choose_baselines(grid.baselines)
    with only_run(out):
        setup = set_up(grid, impossible, quiet=quiet)
        impossible |= _check_sizes(setup, impossible)
        if note is not None:
            setup.notes.append(note)
            if not quiet:
                say(note)
        comparison = _record(setup, list(GridRunner(setup, out, impossible, baselines).rows()))
        write_files(comparison, out)
        shutil.rmtree(out / "work", ignore_errors=True)
    return comparison


def check_names(grid: Grid) -> dict[Cell, str]:
    """Find the cells that are impossible whatever the model is, with the reason.

    Raises:
        TwofoldError: if a name is unknown, or a refinement goes with none of the objectives.
    """
    for name in grid.kernels:
        OBJECTIVES.get(name)
    for name in grid.allocate:
        ALLOCATIONS.get(name)
    for name in (name for chain in grid.chains for name in chain):
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


def _check_sizes(setup: GridSetup, impossible: Mapping[Cell, str]) -> dict[Cell, str]:
    """Find the cells whose size the model can't have, with the reason.

    Raises:
        TwofoldError: if no cell is left.
    """
    reasons: dict[Cell, str] = {}
    cells = list(setup.grid.cells())
    for keep, objective in product(
        setup.grid.keep, setup.grid.kernels
    ):  # the shapes alone say it, whatever the rest is
        same = [cell for cell in cells if cell.keep == keep and cell.objective == objective]
        try:
            plan_of_shapes(setup.loaded, setup.targets, setup.recipe_of(same[0]))
        except TwofoldError as error:
            reasons |= dict.fromkeys(same, str(error))
    if all(cell in reasons or cell in impossible for cell in cells):
        raise TwofoldError(next(iter(reasons.values())) if reasons else impossible[cells[0]])
    return reasons


def _record(setup: GridSetup, rows: list[ComparisonRow]) -> Comparison:
    loaded, data = setup.loaded, setup.data if setup.calibrated else None
    calibrated = [row.seconds["calibrate"] for row in rows if "calibrate" in row.seconds]  # of the run that did it
    return Comparison(
        command=setup.grid.command(),
        model=public_name(loaded.name),
        machine=machine(loaded.residence.device, loaded.residence.dtype),
        seed=setup.recipe.seed,
        calibration=without_paths(data.samples.source) if data is not None else "none: the weights alone are used",
        calibration_tokens=data.units if data is not None else 0,
        unit=data.samples.unit if data is not None else "tokens",
        prediction=setup.opened.need_task().prediction,
        calibration_sha256=data.samples.sha256 if data is not None else "",
        fingerprint=next((row.fingerprint for row in rows if row.fingerprint), ""),
        texts=[text for text, _ in setup.texts],
        rows=rows,
        seconds={**({"calibrate": max(calibrated)} if calibrated else {}), **setup.watch.seconds},
        notes=setup.notes,
    )


def write_files(comparison: Comparison, out: Path) -> None:
    """Write the tables and the figure beside the finished rows.

    Raises:
        TwofoldError: if the disk does not take them; then those of an earlier run are left as they were.
    """
    staged = out / f".{os.getpid()}.output"
    try:
        staged.mkdir(exist_ok=True)
        with decorating("figure", comparison.notes):
            draw_front(comparison, [staged / "compare.png", staged / "compare.svg"])
        (staged / "compare.json").write_text(comparison.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (staged / "compare.csv").write_text(csv_table(comparison), encoding="utf-8", newline="")
        (staged / "compare.md").write_text(markdown(comparison), encoding="utf-8")
        for path in sorted(staged.iterdir()):
            path.replace(out / path.name)
    except OSError as error:
        raise TwofoldError(f"the tables can't be written to {out}: {error}; free some space and run again") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
