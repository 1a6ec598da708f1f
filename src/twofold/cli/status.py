"""twofold status: how far a run has come, and the removal of an unfinished one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

import twofold
from twofold.cli.flags import Json
from twofold.cli.tables import answer, console, megabytes, table

if TYPE_CHECKING:
    from twofold.run.status import Status


def command(
    out: Annotated[Path, typer.Argument(help="The --out of a run.")],
    remove: Annotated[bool, typer.Option("--remove", help="Remove the state of an unfinished run.")] = False,
    json_output: Json = False,
) -> None:
    """Show how far a run has come: what a run that was stopped will go on from, and where it lies.

    The same command that began a run takes it up again. --remove deletes its unfinished state.
    """
    status = twofold.status(out, remove=remove)
    answer(status, json_output, lambda: print_status(status, remove))


def print_status(status: Status, removed: bool) -> None:
    """How far a run has come."""
    if status.state == "finished":
        console.print(
            f"finished: {escape(status.model)}, in {status.hours:.2f} h; {escape(status.out)}", soft_wrap=True
        )
        return
    if removed:
        console.print(f"removed: {escape(status.work)} ({megabytes(status.work_bytes)})", soft_wrap=True)
        return
    rows = [
        ["state", f"{status.state}, at: {status.stage}"],
        ["model", status.model],
        ["begun", f"{60 * status.hours:.0f} minutes ago"],
        [
            "calibration",
            "finished" if status.moments_done else f"{status.moments_parts} sweeps over some blocks finished",
        ],
        ["weights decomposed", f"{status.decomposed} of {status.targets or '?'}"],
        *([["models measured to find the size", str(status.measured)]] if status.measured else []),
        ["parts of the checkpoint written", str(status.parts)],
        ["state on disk", megabytes(status.work_bytes)],
        ["moments on disk", megabytes(status.moments_bytes)],
    ]
    table(status.out, ["", ""], rows, left=2)
    console.print(f"State: {escape(status.work)}", soft_wrap=True)
    if status.moments:
        console.print(f"Moments: {escape(status.moments)}", soft_wrap=True)
    if status.finished:
        console.print("A finished checkpoint of an earlier run stands in the folder.")
    if status.state == "stopped":
        console.print("The command that began it goes on from here; twofold status --remove deletes it.")
