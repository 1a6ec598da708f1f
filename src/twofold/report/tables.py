"""The tables that the page and the card share, as rows of words."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.planning.plan import Plan
from twofold.report.formats import NONE, count, duration, fraction, megabytes, millions, number, percent
from twofold.report.kinds import LossScale, by_kind, kind_labels
from twofold.report.names import without_paths
from twofold.report.record import Measured, Run


@dataclass(frozen=True)
class TextTable:
    """Words in rows. The columns after the first ``left`` hold numbers; with ``last_left`` the last one holds words."""

    columns: list[str]
    rows: list[list[str]]
    left: int = 1
    last_left: bool = False


def size_table(plan: Plan) -> TextTable:
    """Show both numbers for size: over the factorized weights and over the whole model, in parameters and in bytes."""
    bytes_after = plan.bytes_after - plan.dense_bytes
    rows = [
        ("factorized weights, parameters", plan.target_before, plan.target_after, millions),
        ("whole model, parameters", plan.model_before, plan.model_after, millions),
        ("factorized weights, bytes", plan.target_bytes_before, bytes_after, megabytes),
        ("whole model, bytes", plan.bytes_before, plan.bytes_after, megabytes),
    ]
    return TextTable(
        ["", "before", "after", "kept"],
        [[name, show(before), show(after), percent(fraction(after, before), 2)] for name, before, after, show in rows],
    )


def quality_table(run: Run, quality: Measured) -> TextTable:
    """Show the original beside the factored model on the same predictions."""
    old, new = quality.original, quality.factored
    nats = f"nats per {quality.prediction}"
    rows = []
    if old.get("perplexity") is not None:
        rows.append(["perplexity", number(old.get("perplexity"), 4), number(new.get("perplexity"), 4)])
        rows.append(["perplexity, times the original", "1", number(quality.ratio)])
    if old.get("loss") is not None:
        rows.append([f"loss, {nats}", number(old.get("loss"), 4), number(new.get("loss"), 4)])
    rows += [
        *([name.replace("_", " "), *(number(score, 4) for score in both)] for name, both in quality.scores.items()),
        [f"divergence from the original, {nats}: measured", NONE, number(new.get("divergence"))],
        [f"divergence from the original, {nats}: predicted", NONE, number(run.predicted_divergence)],
        [quality.agreement, NONE, percent(new.get("agreement"))],
    ]
    return TextTable(["", "original", "factored"], rows)


def kind_table(plan: Plan, loss: LossScale) -> TextTable:
    """Show ranks, parameters and losses of each kind."""
    rows = []
    lost = sum(entry.predicted_loss or 0.0 for entry in plan.entries)
    for group in by_kind(plan):
        ranks = [entry.rank for entry in group.entries if entry.rank is not None]
        part = group.lost / lost if loss.additive and lost else None if loss.additive else group.shown(loss)
        span = "–".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else NONE
        weights = [str(len(group.entries)), span, str(len(group.entries) - len(ranks))]
        sizes = [millions(group.before), millions(group.after), percent(group.keep)]
        rows.append([group.label, *weights, *sizes, percent(part) if loss.known else NONE])
    last = "share of the predicted loss" if loss.additive else "of its own Σσ² left out"
    return TextTable(["kind", "weights", "ranks", "dense", "before", "after", "kept", last], rows)


def reason_table(plan: Plan) -> TextTable:
    """List every parameter of the model by the reason for what became of it."""
    sums: dict[tuple[str, str], tuple[int, int, int]] = {}

    def add(what: str, why: str, before: int, after: int) -> None:
        tensors, old, new = sums.get((what, why), (0, 0, 0))
        sums[what, why] = tensors + 1, old + before, new + after

    for entry in plan.entries:
        what = "dense" if entry.rank is None else "factorized"
        add(what, entry.reason.removeprefix("dense: "), entry.numbers_before, entry.numbers_after)
    for other in plan.dense:
        add("not considered", other.reason, other.numbers, other.numbers)
    return TextTable(
        ["what", "why", "tensors", "parameters before", "after"],
        [
            [what, without_paths(why), str(n), millions(old), millions(new)]
            for (what, why), (n, old, new) in sums.items()
        ],
        left=2,
    )


def time_table(run: Run) -> TextTable:
    """Show the seconds of each stage."""
    rows = [[name, duration(value)] for name, value in run.seconds.items()]
    if "total" not in run.seconds:
        rows.append(["sum", duration(sum(run.seconds.values()))])
    return TextTable(["stage", "time"], rows)


def weight_table(plan: Plan, loss: LossScale) -> TextTable:
    """List every weight that could be factorized."""
    labels = kind_labels(plan)

    def shown(value: float | None) -> str:
        return NONE if value is None else number(loss.factor * value)

    rows = [
        [
            e.name,
            labels[e.name],
            f"{e.out_features} × {e.in_features}",
            "dense" if e.rank is None else str(e.rank),
            (e.form or NONE) if e.bits is None else f"{e.form or 'dense'}, {e.bits} bits",
            count(e.numbers_before),
            count(e.numbers_after),
            percent(e.keep),
            shown(e.predicted_loss),
            shown(e.measured_loss),
            without_paths(e.reason),
        ]
        for e in plan.entries
    ]
    sizes = ["before", "after", "kept", "predicted", "from the factors"]
    return TextTable(["weight", "kind", "shape", "rank", "form", *sizes, "why"], rows, left=2, last_left=True)
