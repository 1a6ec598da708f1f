"""The tables that the page and the card share, as rows of words."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.planning.plan import Plan
from twofold.report.formats import NONE, count, duration, megabytes, millions, number, percent, share
from twofold.report.kinds import Loss, by_kind, kind_labels
from twofold.report.names import without_paths
from twofold.report.record import Measured, Run


@dataclass(frozen=True)
class Table:
    """Words in rows. The columns after the first ``left`` hold numbers; with ``last_left`` the last one holds words."""

    columns: list[str]
    rows: list[list[str]]
    left: int = 1
    last_left: bool = False


def size_table(plan: Plan) -> Table:
    """Both numbers for size: over the factorized weights and over the whole model, in parameters and in bytes."""
    element = plan.element_bytes
    bytes_after = plan.bytes_after - plan.dense_bytes
    rows = [
        ("factorized weights, parameters", plan.target_before, plan.target_after, millions),
        ("whole model, parameters", plan.model_before, plan.model_after, millions),
        ("factorized weights, bytes", plan.target_before * element, bytes_after, megabytes),
        ("whole model, bytes", plan.bytes_before, plan.bytes_after, megabytes),
    ]
    return Table(
        ["", "before", "after", "kept"],
        [[name, show(before), show(after), percent(share(after, before), 2)] for name, before, after, show in rows],
    )


def ratio(quality: Measured) -> float | None:
    """The factored model's perplexity over the original's."""
    before, after = quality.original.get("perplexity"), quality.factored.get("perplexity")
    return after / before if before and after is not None else None


def quality_table(run: Run, quality: Measured) -> Table:
    """The original beside the factored model on the same tokens."""
    old, new = quality.original, quality.factored
    times = ratio(quality)
    return Table(
        ["", "original", "factored"],
        [
            ["perplexity", number(old.get("perplexity"), 4), number(new.get("perplexity"), 4)],
            ["perplexity, times the original", "1", number(times)],
            ["loss, nats per token", number(old.get("loss"), 4), number(new.get("loss"), 4)],
            ["divergence from the original, nats per token: measured", NONE, number(new.get("divergence"))],
            ["divergence from the original, nats per token: predicted", NONE, number(run.predicted_divergence)],
            ["same most likely token", NONE, percent(new.get("agreement"))],
        ],
    )


def kind_table(plan: Plan, loss: Loss) -> Table:
    """Ranks, parameters and losses of each kind."""
    rows = []
    lost = sum(entry.predicted_loss or 0.0 for entry in plan.entries)
    for group in by_kind(plan):
        ranks = [entry.rank for entry in group.entries if entry.rank is not None]
        part = group.lost / lost if loss.additive and lost else None if loss.additive else group.shown(loss)
        rows.append(
            [
                group.label,
                str(len(group.entries)),
                "–".join(str(r) for r in sorted({min(ranks), max(ranks)})) if ranks else NONE,
                str(sum(entry.rank is None for entry in group.entries)),
                millions(group.before),
                millions(group.after),
                percent(group.keep),
                percent(part) if loss.known else NONE,
            ]
        )
    last = "share of the predicted loss" if loss.additive else "of its own Σσ² left out"
    return Table(["kind", "weights", "ranks", "dense", "before", "after", "kept", last], rows)


def reason_table(plan: Plan) -> Table:
    """Every parameter of the model by the reason for what became of it."""
    sums: dict[tuple[str, str], list[int]] = {}
    for entry in plan.entries:
        what = "dense" if entry.rank is None else "factorized"
        row = sums.setdefault((what, entry.reason.removeprefix("dense: ")), [0, 0, 0])
        for i, value in enumerate((1, entry.numbers_before, entry.numbers_after)):
            row[i] += value
    for left in plan.dense:
        row = sums.setdefault(("not considered", left.reason), [0, 0, 0])
        for i, value in enumerate((1, left.numbers, left.numbers)):
            row[i] += value
    return Table(
        ["what", "why", "tensors", "parameters before", "after"],
        [[what, without_paths(why), str(n), millions(a), millions(b)] for (what, why), (n, a, b) in sums.items()],
        left=2,
    )


def time_table(run: Run) -> Table:
    """Seconds of each stage."""
    rows = [[name, duration(value)] for name, value in run.seconds.items()]
    if "total" not in run.seconds:
        rows.append(["sum", duration(sum(run.seconds.values()))])
    return Table(["stage", "time"], rows)


def weight_table(plan: Plan, loss: Loss) -> Table:
    """Every weight that could be factorized."""
    labels = kind_labels(plan)
    scale = loss.factor

    def shown(value: float | None) -> str:
        return NONE if value is None else number(scale * value)

    rows = [
        [
            e.name,
            labels[e.name],
            f"{e.out_features} × {e.in_features}",
            "dense" if e.rank is None else str(e.rank),
            (e.form or NONE) if e.bits is None else f"{e.form or 'dense'}, {e.bits} bits",
            count(e.numbers_before),
            count(e.numbers_after),
            percent(share(e.numbers_after, e.numbers_before)),
            shown(e.predicted_loss),
            shown(e.measured_loss),
            without_paths(e.reason),
        ]
        for e in plan.entries
    ]
    columns = [
        "weight",
        "kind",
        "shape",
        "rank",
        "form",
        "before",
        "after",
        "kept",
        "predicted",
        "from the factors",
        "why",
    ]
    return Table(columns, rows, left=2, last_left=True)
