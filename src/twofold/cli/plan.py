"""twofold plan: what would be done with every weight, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofold.cli.settings import recipe_flags
from twofold.errors import TwofoldError
from twofold.recipe import Recipe


@recipe_flags
def command(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan to this JSON file too.")] = None,
    moments: Annotated[Path | None, typer.Option(help="Folder of the moments \\[default: in the cache].")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Show the rank, size and predicted loss of every weight under a budget.

    With --calibration the plan is the one that compress would carry out, and the moments are kept for it.
    Without it the ranks come from the weights' shapes alone, and the plan says so.
    """
    from twofold.cli.tables import print_plan
    from twofold.run.factorize import plan_model

    plan = plan_model(recipe, moments_file=moments, quiet=quiet)
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            plan.save(out)
        except OSError as error:
            raise TwofoldError(f"the plan can't be written to {out}: {error.strerror}") from error
    if json_output:
        print(plan.model_dump_json(indent=1))
    else:
        print_plan(plan)
