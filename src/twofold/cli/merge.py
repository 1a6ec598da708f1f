"""twofold merge: put adapters into a model, or several into one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import twofold
from twofold.cli.flags import Dequantize, Json, Out, Overwrite, Trust
from twofold.cli.tables import millions, plain, print_notes, print_place, run_command, tell

if TYPE_CHECKING:
    from twofold.adapters.merge import Merge


def command(
    model: Annotated[str, typer.Argument(help="The model that the adapters were trained on.")],
    adapters: Annotated[list[str], typer.Argument(help="Folders of LoRA adapters.")],
    out: Out,
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
    dequantize: Dequantize = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json_output: Json = False,
) -> None:
    """Merge LoRA adapters into a model: exactly, the rank of a factored layer grows by theirs; or back to the old size."""
    run_command(twofold.merge, {**locals()}, partial(print_merged, out=out))


def print_merged(merge: Merge, out: Path) -> None:
    """Print what was merged."""
    if merge.ranks:
        ranks = list(merge.ranks.values())
        tell(f"{len(ranks)} layers of ranks {min(ranks)} to {max(ranks)}.")
    if merge.metric:
        tell(f"What was left out was chosen {plain(merge.metric)}.")
    before, after = millions(merge.parameters_before), millions(merge.parameters_after)
    tell(f"Parameters: {after}, the model alone has {before}.")
    print_notes(merge.notes)
    print_place("Written", out)
