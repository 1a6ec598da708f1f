"""twofold extract: a LoRA adapter out of two models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import twofold
from twofold.cli.flags import Json, Out, Overwrite, Quiet, Trust
from twofold.cli.tables import millions, plain, print_notes, print_place, run_command, tell

if TYPE_CHECKING:
    from twofold.adapters.extract import Extraction


def command(
    tuned: Annotated[str, typer.Argument(help="The tuned model: a folder or a hub id.")],
    base: Annotated[str, typer.Option(help="The model that it was tuned from.")],
    out: Out,
    rank: Annotated[int | None, typer.Option(min=1, help="A budget: the mean rank of the layers.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="In its place: the share of each layer's change to keep.")
    ] = None,
    moments: Annotated[
        Path | None, typer.Option(help="Moments of the base: measure the change in their metric.")
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a LoRA adapter that turns one model into another as far as its ranks go; each layer has a rank of its own."""
    run_command(twofold.extract, {**locals()}, partial(print_extracted, out=out))


def print_extracted(extraction: Extraction, out: Path) -> None:
    """Print what was extracted."""
    ranks = list(extraction.ranks.values())
    tell(
        f"{len(ranks)} layers, ranks {min(ranks)} to {max(ranks)}, {millions(extraction.numbers)} numbers: "
        f"{extraction.energy:.1%} of the change {plain(extraction.metric)}.",
    )
    print_notes(extraction.notes)
    print_place("Adapter", out)
