"""twofold status: how far a run has come, and the removal of an unfinished one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import twofold
from twofold.cli.flags import Json
from twofold.cli.tables import megabytes, plain, print_record, table, tell
from twofold.host.progress import duration

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
    print_record(twofold.status(out, remove=remove), json_output, partial(print_status, removed=remove))


def print_status(status: Status, removed: bool) -> None:
    """Print how far a run has come."""
    if status.state == "finished":
        tell(f"finished: {plain(status.model)}, in {duration(3600 * status.hours)}; {plain(status.out)}", wrap=False)
        return
    if removed:
        tell(f"removed: {plain(status.work)} ({megabytes(status.work_bytes)})", wrap=False)
        return
    calibration = "finished" if status.moments_done else f"{status.moments_parts} sweeps over some blocks finished"
    rows: list[list[object]] = [
        ["state", f"{status.state}, at: {status.stage}"],
        ["model", status.model],
        ["begun", f"{duration(3600 * status.hours)} ago"],
        ["calibration", calibration],
        ["weights decomposed", f"{status.decomposed} of {status.targets or '?'}"],
        *([["models measured to find the size", status.measured]] if status.measured else []),
        ["parts of the checkpoint written", status.parts],
        ["state on disk", megabytes(status.work_bytes)],
        ["moments on disk", megabytes(status.moments_bytes)],
    ]
    table(status.out, ["", ""], rows, left=2)
    tell(f"State: {plain(status.work)}", wrap=False)
    if status.moments:
        tell(f"Moments: {plain(status.moments)}", wrap=False)
    if status.finished:
        tell("A finished checkpoint of an earlier run stands in the folder.")
    if status.state == "stopped":
        tell("The command that began it goes on from here; twofold status --remove deletes it.")
