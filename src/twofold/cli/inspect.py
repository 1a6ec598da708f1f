"""twofold inspect: every weight of a model, which can be factorized, and why the others can't."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or smollm2.")],
    include: Annotated[list[str] | None, typer.Option(help="Patterns of layers to factorize.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Patterns of layers to leave dense.")] = None,
    every: Annotated[bool, typer.Option("--all", help="A row for each weight, not for each kind.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the weights of a model: shapes, groups that share an input, and what stays dense and why."""
    from twofold.cli.tables import print_inspection
    from twofold.run.inspect import inspect_model

    found = inspect_model(model, include or [], exclude or [], trust_remote_code=trust_remote_code)
    if json_output:
        print(found.model_dump_json(indent=1))
    else:
        print_inspection(found, every)
