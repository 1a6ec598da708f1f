"""twofold tune: fine-tune a model on rows of questions and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from twofold.cli.settings import tune_flags


@tune_flags
def command(
    settings: Any,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would take, and do nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the record of the run as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Fine-tune a model with an adapter, on its factors, or whole, and write what was trained with its record and curve.

    Started again with the same settings, a run that was stopped goes on from its last checkpoint.
    """
    from twofold.checkpoint.peft.register import need

    need("peft", "trl", "datasets")
    from twofold.cli.tune_tables import print_estimated, print_tuned
    from twofold.tuning.prepare import prepare
    from twofold.tuning.run import tune
    from twofold.tuning.trainer import quiet_libraries

    if dry_run:
        with quiet_libraries():
            found = prepare(settings, must_estimate=True).estimate
        assert found is not None
        if json_output:
            print(json.dumps({**found.model_dump(), "memory": found.memory}, indent=1))
        else:
            print_estimated(found)
        return
    run = tune(settings, out, overwrite=overwrite, quiet=quiet)
    if json_output:
        print(run.model_dump_json(indent=1))
    else:
        print_tuned(run, out)
