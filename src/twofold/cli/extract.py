"""twofold extract: a LoRA adapter out of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    tuned: Annotated[str, typer.Argument(help="The tuned model: a folder or a hub id.")],
    base: Annotated[str, typer.Option(help="The model that it was tuned from.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the adapter to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="A budget: the mean rank of the layers.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="In its place: the share of each layer's change to keep.")
    ] = None,
    moments: Annotated[
        Path | None, typer.Option(help="Moments of the base: measure the change in their metric.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Write a LoRA adapter that turns one model into another as far as its ranks go; each layer has a rank of its own."""
    from twofold.checkpoint.peft.register import need

    need("peft")
    from twofold.adapters.extract import extract
    from twofold.cli.tune_tables import print_extracted

    made = extract(tuned, base, out, rank=rank, energy=energy, moments=moments, overwrite=overwrite, quiet=quiet)
    if json_output:
        print(made.model_dump_json(indent=1))
    else:
        print_extracted(made, out)
