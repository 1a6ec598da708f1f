"""twofold compress: factorize a model and write the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import twofold
from twofold.cli.flags import Json, Lang, Moments, Out, Overwrite, Quiet
from twofold.cli.settings import settings_flags
from twofold.cli.tables import number, print_end, print_record, print_samples, print_sizes, table
from twofold.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from twofold.planning.plan import Plan, PlanEntry
    from twofold.report.record import Run


@settings_flags(make_recipe, Recipe)
def command(
    recipe: Recipe,
    out: Out,
    overwrite: Overwrite = False,
    moments: Moments = None,
    lang: Lang = "en",
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Factorize the weight matrices of a model and write the smaller checkpoint, with its plan, card and report."""
    run = twofold.compress(recipe, out, overwrite=overwrite, moments=moments, lang=lang, quiet=quiet)
    if run is not None:  # else one of many processes; the first prints
        print_record(run, json_output, lambda run: print_run(run, twofold.Plan.load(out / "plan.json"), out))


def print_run(run: Run, plan: Plan, out: Path) -> None:
    """Print what a compress run did, cost and gained."""
    from twofold.report.kinds import kind_labels, stacks_in

    kinds: dict[str, list[PlanEntry]] = {}
    labels = kind_labels(plan) if stacks_in(plan) else {}
    for entry in plan.entries:
        kinds.setdefault(labels.get(entry.name, entry.kind), []).append(entry)
    table(
        "Ranks by kind",
        ["kind", "weights", "lowest rank", "mean rank", "highest", "dense", "kept"],
        (
            [
                kind,
                len(group),
                *_spread([e.rank for e in group if e.rank is not None]),
                sum(e.rank is None for e in group),
                f"{sum(e.numbers_after for e in group) / sum(e.numbers_before for e in group):.1%}",
            ]
            for kind, group in kinds.items()
        ),
    )
    print_sizes(plan)
    if run.quality is not None:
        q = run.quality
        known = [] if q.original["perplexity"] is None else ["perplexity"]
        table(
            f"Quality on {q.text} ({q.size or f'{q.windows} windows of {q.window} tokens'})",
            ["", "original", "factored"],
            [
                *([name, number(q.original[name], ".2f"), number(q.factored[name], ".2f")] for name in known),
                *(
                    [name.replace("_", " "), *(number(score, ".4f") for score in both)]
                    for name, both in q.scores.items()
                ),
                [
                    f"divergence from the original, nats per {q.prediction}",
                    "–",
                    number(q.factored["divergence"], ".4f"),
                ],
                [q.agreement, "–", number(q.factored["agreement"], ".1%")],
            ],
        )
    print_samples(run.samples, "original", "factored")
    print_end(run, {"Checkpoint": out, "Report": out / "report.html"})


def _spread(ranks: list[int]) -> list[object]:
    """Return the lowest, the mean and the highest rank."""
    return [min(ranks), f"{sum(ranks) / len(ranks):.0f}", max(ranks)] if ranks else ["–"] * 3
