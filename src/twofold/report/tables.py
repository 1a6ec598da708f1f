"""The tables that the page and the card share, as rows of words."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.planning.plan import Plan
from twofold.report.formats import NONE, fraction
from twofold.report.kinds import LossScale, by_kind, kind_labels
from twofold.report.messages import ENGLISH, Words
from twofold.report.names import without_paths
from twofold.report.record import Measured, Run


@dataclass(frozen=True)
class TextTable:
    """Words in rows. The columns after the first ``left`` hold numbers; with ``last_left`` the last one holds words."""

    columns: list[str]
    rows: list[list[str]]
    left: int = 1
    last_left: bool = False


def size_table(plan: Plan, words: Words = ENGLISH) -> TextTable:
    """Show both numbers for size: over the factorized weights and over the whole model, in parameters and in bytes."""
    bytes_after = plan.bytes_after - plan.dense_bytes
    rows = [
        (words.say("row.target.numbers"), plan.target_before, plan.target_after, words.millions),
        (words.say("row.model.numbers"), plan.model_before, plan.model_after, words.millions),
        (words.say("row.target.bytes"), plan.target_bytes_before, bytes_after, words.megabytes),
        (words.say("row.model.bytes"), plan.bytes_before, plan.bytes_after, words.megabytes),
    ]
    return TextTable(
        ["", *(words.say(f"column.{name}") for name in ("before", "after", "kept"))],
        [
            [name, show(before), show(after), words.percent(fraction(after, before), 2)]
            for name, before, after, show in rows
        ],
    )


def quality_table(run: Run, quality: Measured, words: Words = ENGLISH) -> TextTable:
    """Show the original beside the factored model on the same predictions."""
    old, new = quality.original, quality.factored
    nats = words.nats(quality.prediction)
    rows = []
    if old.get("perplexity") is not None:
        rows.append(
            [
                words.say("row.perplexity"),
                words.number(old.get("perplexity"), 4),
                words.number(new.get("perplexity"), 4),
            ]
        )
        rows.append([words.say("row.times"), "1", words.number(quality.ratio)])
    if old.get("loss") is not None:
        rows.append(
            [words.say("row.loss", unit=nats), words.number(old.get("loss"), 4), words.number(new.get("loss"), 4)]
        )
    rows += [
        *(
            [words.told(name.replace("_", " ")), *(words.number(score, 4) for score in both)]
            for name, both in quality.scores.items()
        ),
        [words.say("row.measured", unit=nats), NONE, words.number(new.get("divergence"))],
        [words.say("row.predicted", unit=nats), NONE, words.number(run.predicted_divergence)],
        [words.told(quality.agreement), NONE, words.percent(new.get("agreement"))],
    ]
    return TextTable(["", words.say("original"), words.say("factored")], rows)


def kind_table(plan: Plan, loss: LossScale, words: Words = ENGLISH) -> TextTable:
    """Show ranks, parameters and losses of each kind."""
    rows = []
    lost = sum(entry.predicted_loss or 0.0 for entry in plan.entries)
    for group in by_kind(plan):
        ranks = [entry.rank for entry in group.entries if entry.rank is not None]
        part = group.lost / lost if loss.additive and lost else None if loss.additive else group.shown(loss)
        span = "–".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else NONE
        weights = [str(len(group.entries)), span, str(len(group.entries) - len(ranks))]
        sizes = [words.millions(group.before), words.millions(group.after), words.percent(group.keep)]
        rows.append([group.label, *weights, *sizes, words.percent(part) if loss.known else NONE])
    last = "share" if loss.additive else "own"
    columns = ["column.kind", "column.weights", "column.ranks", "dense", "column.before", "column.after", "column.kept"]
    return TextTable([words.say(key) for key in (*columns, f"column.{last}")], rows)


def reason_table(plan: Plan, words: Words = ENGLISH) -> TextTable:
    """List every parameter of the model by the reason for what became of it."""
    sums: dict[tuple[str, str], tuple[int, int, int]] = {}

    def add(what: str, why: str, before: int, after: int) -> None:
        tensors, old, new = sums.get((what, why), (0, 0, 0))
        sums[what, why] = tensors + 1, old + before, new + after

    for entry in plan.entries:
        add(
            "dense" if entry.rank is None else "factorized",
            entry.reason.removeprefix("dense: "),
            entry.numbers_before,
            entry.numbers_after,
        )
    for other in plan.dense:
        add("other", other.reason, other.numbers, other.numbers)
    return TextTable(
        [words.say(f"column.{name}") for name in ("what", "why", "tensors", "parameters", "after")],
        [
            [
                words.say(f"tensor.{what}"),
                words.told(without_paths(why)),
                str(n),
                words.millions(old),
                words.millions(new),
            ]
            for (what, why), (n, old, new) in sums.items()
        ],
        left=2,
    )


def time_table(run: Run, words: Words = ENGLISH) -> TextTable:
    """Show the seconds of each stage."""
    rows = [[words.told(name), words.duration(value)] for name, value in run.seconds.items()]
    if "total" not in run.seconds:
        rows.append([words.say("row.sum"), words.duration(sum(run.seconds.values()))])
    return TextTable([words.say("column.stage"), words.say("column.time")], rows)


def weight_table(plan: Plan, loss: LossScale, words: Words = ENGLISH) -> TextTable:
    """List every weight that could be factorized."""
    labels = kind_labels(plan)

    def shown(value: float | None) -> str:
        return NONE if value is None else words.number(loss.factor * value)

    rows = [
        [
            e.name,
            labels[e.name],
            f"{e.out_features} × {e.in_features}",
            words.say("dense") if e.rank is None else str(e.rank),
            (e.form or NONE) if e.bits is None else words.say("bits", form=e.form or words.say("dense"), bits=e.bits),
            words.count(e.numbers_before),
            words.count(e.numbers_after),
            words.percent(e.keep),
            shown(e.predicted_loss),
            shown(e.measured_loss),
            words.told(without_paths(e.reason.removeprefix("dense: "))),
        ]
        for e in plan.entries
    ]
    named = ("before", "after", "kept", "predicted", "factors", "why")
    columns = ["table.weight", "column.kind", "column.shape", "rank", "column.form", *(f"column.{n}" for n in named)]
    return TextTable([words.say(key) for key in columns], rows, left=2, last_left=True)
