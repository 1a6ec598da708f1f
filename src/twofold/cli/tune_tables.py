"""The tables of tune, merge and extract."""

from __future__ import annotations

from pathlib import Path

from twofold.adapters.extract import Extraction
from twofold.adapters.merge import Merge
from twofold.cli.tables import console, megabytes, millions, plain, print_spent, table
from twofold.tuning.estimate import TuneEstimate
from twofold.tuning.record import TuneRun


def print_extracted(made: Extraction, out: Path) -> None:
    """What was extracted."""
    ranks = list(made.ranks.values())
    console.print(
        f"{len(ranks)} layers, ranks {min(ranks)} to {max(ranks)}, {millions(made.numbers)} numbers: {made.energy:.1%} of the "
        f"change {plain(made.metric)}."
    )
    for note in made.notes:
        console.print(f"Note: {plain(note)}.")
    console.print(f"Adapter: {plain(str(out))}", highlight=False, soft_wrap=True)


def print_merged(made: Merge, out: Path) -> None:
    """What was merged."""
    if made.ranks:
        ranks = list(made.ranks.values())
        console.print(f"{len(ranks)} layers of ranks {min(ranks)} to {max(ranks)}.")
    if made.metric:
        console.print(f"What was left out was chosen {plain(made.metric)}.")
    console.print(
        f"Parameters: {millions(made.parameters_after)}, the model alone has {millions(made.parameters_before)}."
    )
    for note in made.notes:
        console.print(f"Note: {plain(note)}.")
    console.print(f"Written: {plain(str(out))}", highlight=False, soft_wrap=True)


def print_tuned(run: TuneRun, out: Path) -> None:
    """What a fine-tuning did, cost and gained."""
    table(
        "Fine-tuning",
        ["", ""],
        [
            ["method", run.settings.method],
            ["trained numbers", f"{millions(run.trainable)} of {millions(run.parameters)}"],
            ["rows", f"{run.rows:,}, and {run.rows_held_out:,} held out"],
            ["steps", f"{run.steps:,} of {run.step_seconds:.2f} s"],
            ["held-out loss before, nats a token", _nats(run.held_out_before)],
            ["held-out loss after", _nats(run.held_out_after)],
        ],
    )
    for sample in run.samples:
        console.print(f"[bold]{plain(sample.prompt[-300:].strip())}[/bold]")
        console.print(f"  before: {plain(sample.original.strip())}")
        console.print(f"  after: {plain(sample.factored.strip())}")
    print_spent(run.notes, run.seconds, run.peak_memory)
    console.print(f"Written: {plain(str(out))}", highlight=False, soft_wrap=True)


def print_estimated(found: TuneEstimate) -> None:
    """What a fine-tuning would take."""
    parts = ("program", "weights", "gradients", "optimizer", "activations", "head", "spare")
    rows = [[name, megabytes(getattr(found, name))] for name in parts]
    table("Peak memory, estimated", ["", ""], [*rows, ["in all", megabytes(found.memory)]])
    again = ", activations computed anew" if found.gradient_checkpointing else ""
    console.print(
        f"Method {found.method}: {millions(found.trainable)} of {millions(found.parameters)} numbers are trained, "
        f"{found.micro_batch} × {found.accumulation} rows a step{again}."
    )
    console.print(
        f"Time: about {found.step_seconds:.1f} s a step, {found.seconds / 60:.1f} min for {found.steps:,} steps."
    )


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
