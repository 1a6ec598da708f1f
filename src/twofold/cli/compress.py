"""twofold compress: factorize a model and write the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofold.cli.settings import recipe_flags
from twofold.recipe import Recipe


@recipe_flags
def command(
    recipe: Recipe,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    moments: Annotated[Path | None, typer.Option(help="Folder of the moments \\[default: in the cache].")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the record of the run as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Factorize the weight matrices of a model and write the smaller checkpoint, with its plan, card and report."""
    from twofold.cli.tables import print_run
    from twofold.planning.plan import Plan
    from twofold.run.compress import compress

    run = compress(recipe, out, overwrite=overwrite, moments_file=moments, quiet=quiet)
    if run is None:  # one of many processes; the first prints
        return
    if json_output:
        print(run.model_dump_json(indent=1))
    else:
        print_run(run, Plan.load(out / "plan.json"), out)
