"""twofold merge: put adapters into a model, or several into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="The model that the adapters were trained on.")],
    adapters: Annotated[list[str], typer.Argument(help="Folders of LoRA adapters.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="How much an adapter counts; once for each, in order.")
    ] = None,
    recompress: Annotated[
        bool, typer.Option("--recompress", help="Bring each factored layer back to the rank that it had.")
    ] = False,
    adapter_rank: Annotated[
        int | None, typer.Option(min=1, help="Write one adapter and no model: its mean rank, as a budget.")
    ] = None,
    moments: Annotated[
        Path | None, typer.Option(help="Moments of the model: leave out what counts least for it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Merge LoRA adapters into a model: exactly, the rank of a factored layer grows by theirs; or back to the old size."""
    from twofold.checkpoint.peft.register import need

    need("peft")
    from twofold.adapters.merge import merge
    from twofold.cli.tune_tables import print_merged

    made = merge(
        model, adapters, out, weights=weight, recompress=recompress, adapter_rank=adapter_rank, moments=moments,
        overwrite=overwrite,
    )  # fmt: skip
    if json_output:
        print(made.model_dump_json(indent=1))
    else:
        print_merged(made, out)
