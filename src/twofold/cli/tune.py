"""twofold tune: fine-tune a model on rows of questions and answers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import twofold
from twofold.cli.flags import Json, Out, Overwrite, Quiet
from twofold.cli.settings import settings_flags
from twofold.cli.tables import megabytes, millions, number, print_end, print_record, print_samples, table, tell
from twofold.host.progress import duration
from twofold.tuning.settings import TuneSettings, make_settings

if TYPE_CHECKING:
    from twofold.tuning.estimate import TuneEstimate
    from twofold.tuning.record import TuneRun


@settings_flags(make_settings, TuneSettings)
def command(
    settings: TuneSettings,
    out: Out,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would take, and do nothing.")] = False,
    overwrite: Overwrite = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model with an adapter, on its factors, or whole, and write what was trained with its record and curve.

    Started again with the same settings, a run that was stopped goes on from its last checkpoint.
    """
    if dry_run:
        print_record(twofold.tune(settings, out, dry_run=True), json_output, print_estimated)
    else:
        run = twofold.tune(settings, out, overwrite=overwrite, quiet=quiet)
        print_record(run, json_output, partial(print_tuned, out=out))


def print_tuned(run: TuneRun, out: Path) -> None:
    """Print what a fine-tuning did, cost and gained."""
    table(
        "Fine-tuning",
        ["", ""],
        [
            ["method", run.settings.method],
            ["trained numbers", f"{millions(run.trainable)} of {millions(run.parameters)}"],
            ["rows", f"{run.rows:,}, and {run.rows_held_out:,} held out"],
            ["steps", f"{run.steps:,} of {run.step_seconds:.2f} s"],
            ["held-out loss before, nats a token", number(run.held_out_before, ".4f")],
            ["held-out loss after", number(run.held_out_after, ".4f")],
        ],
    )
    print_samples(run.samples, "before", "after")
    print_end(run, {"Written": out})


def print_estimated(estimate: TuneEstimate) -> None:
    """Print what a fine-tuning would take."""
    parts = ("program", "weights", "gradients", "optimizer", "activations", "head", "spare")
    rows = [[name, megabytes(getattr(estimate, name))] for name in parts]
    table("Peak memory, estimated", ["", ""], [*rows, ["in all", megabytes(estimate.memory)]])
    again = ", activations computed anew" if estimate.gradient_checkpointing else ""
    tell(
        f"Method {estimate.method}: {millions(estimate.trainable)} of {millions(estimate.parameters)} numbers are trained, "
        f"{estimate.micro_batch} × {estimate.accumulation} rows a step{again}.",
    )
    tell(
        f"Time: about {estimate.step_seconds:.1f} s a step, {duration(estimate.seconds)} for {estimate.steps:,} steps.",
    )
