"""twofold plan: what would be done with every weight, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import twofold
from twofold.cli.flags import Json, Lang, Moments, Quiet
from twofold.cli.settings import settings_flags
from twofold.cli.tables import megabytes, millions, number, plain, print_record, print_sizes, table, tally, tell
from twofold.cli.words import with_flags
from twofold.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from twofold.planning.plan import Estimate, Plan, PlanEntry


@settings_flags(make_recipe, Recipe)
def command(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan to this JSON file too.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the plan to this page too; it plans anew.")] = None,
    lang: Lang = "en",
    moments: Moments = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the rank, size and predicted loss of every weight under a budget.

    With --calibration the plan is the one that compress would carry out, and the moments are kept for it.
    Without it the ranks come from the weights' shapes alone, and the plan says so.
    """
    print_record(
        twofold.plan(recipe, moments=moments, out=out, html=html, lang=lang, quiet=quiet), json_output, print_plan
    )


def print_plan(plan: Plan) -> None:
    """Print every weight with its rank, parameters and predicted loss, then what stays dense, then the sizes."""
    table(
        f"Plan for {plan.model}: {plan.objective}, {plan.allocate}",
        ["weight", "shape", "rank", "parameters", "kept", "predicted loss", "why"],
        (
            [
                e.name,
                f"{e.out_features} × {e.in_features}",
                _rank(e),
                millions(e.numbers_after),
                f"{e.keep:.1%}",
                number(e.predicted_loss, ".3g"),
                e.reason,
            ]
            for e in plan.entries
        ),
    )
    reasons = tally((entry.reason, entry.numbers) for entry in plan.dense)
    rows = [[reason, count, millions(numbers)] for reason, (count, numbers) in reasons.items()]
    table("Left as they are", ["why", "weights", "parameters"], rows)
    print_sizes(plan)
    if plan.predicted_divergence is not None:
        tell(
            f"Predicted divergence from the original: {plan.predicted_divergence:.4f} nats per {plan.prediction} (second order).",
        )
    if plan.estimate is not None:
        print_estimate(plan.estimate)
    for note in plan.notes:
        tell(f"Note: {plain(with_flags(note))}.")


def print_estimate(estimate: Estimate) -> None:
    """Print what a run will take."""
    blocks, total = estimate.blocks_at_once, estimate.total_seconds
    how = {None: "the whole model in memory", 1: "block by block"}.get(blocks, f"{blocks} blocks at a time")
    longest = max(estimate.memory, key=lambda name: estimate.memory[name])
    rows = [
        ["how", how],
        ["peak memory", f"{estimate.peak_memory / 2**30:.2f} GiB (to {longest})"],
        ["memory that may be used", f"{estimate.memory_limit / 2**30:.2f} GiB"],
        ["disk while it runs", megabytes(estimate.work_bytes)],
        ["disk for the moments, kept for the next budget", megabytes(estimate.moments_bytes)],
        ["disk for the checkpoint", megabytes(estimate.output_bytes)],
        *([name, f"{seconds:.0f} s"] for name, seconds in estimate.seconds.items() if seconds >= 0.5),
        ["time in all", f"{total / 60:.0f} min" if total > 120 else f"{total:.0f} s"],
    ]
    table(f"Estimate for this machine, {estimate.threads} threads", ["", ""], rows)


def _rank(entry: PlanEntry) -> str:
    rank = "dense" if entry.rank is None else str(entry.rank)
    return rank if entry.bits is None else f"{rank}, {entry.bits} bits"
