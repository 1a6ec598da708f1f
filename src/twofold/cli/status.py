"""twofold status: how far a run has come, and the removal of an unfinished one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Argument(help="The --out of a run.")],
    remove: Annotated[bool, typer.Option("--remove", help="Remove the state of an unfinished run.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show how far a run has come: what a run that was stopped will go on from, and where it lies.

    The same command that began a run takes it up again. --remove deletes its unfinished state.
    """
    from twofold.cli.tables import print_status
    from twofold.run.status import remove_work, status_of

    status = remove_work(out) if remove else status_of(out)
    if json_output:
        print(status.model_dump_json(indent=1))
    else:
        print_status(status, removed=remove)
