"""The tables that the subcommands print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twofold.evaluation import Evaluation
from twofold.inspection import Inspection
from twofold.plan import Plan, PlanEntry
from twofold.run import Run

console = Console()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table; the columns after the first ``left`` are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right")
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    console.print(made)


def millions(numbers: float) -> str:
    return f"{numbers / 1e6:.2f}M"


def megabytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e6:.1f} MB"


def print_sizes(plan: Plan) -> None:
    """Both numbers for size: over the targeted weights and over the whole model, in parameters and bytes."""
    element = plan.element_bytes
    table(
        "Size",
        ["", "before", "after", "kept"],
        [
            [
                "factorized weights, parameters",
                millions(plan.target_before),
                millions(plan.target_after),
                f"{plan.keep:.2%}",
            ],
            [
                "whole model, parameters",
                millions(plan.model_before),
                millions(plan.model_after),
                f"{plan.keep_model:.2%}",
            ],
            [
                "factorized weights, bytes",
                megabytes(plan.target_before * element),
                megabytes(plan.bytes_after - plan.dense_numbers * element),
                f"{(plan.bytes_after - plan.dense_numbers * element) / (plan.target_before * element):.2%}",
            ],
            [
                "whole model, bytes",
                megabytes(plan.bytes_before),
                megabytes(plan.bytes_after),
                f"{plan.bytes_after / plan.bytes_before:.2%}",
            ],
        ],
    )


def print_plan(plan: Plan) -> None:
    """Every weight with its rank, parameters and predicted loss, then what stays dense, then the sizes."""
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
                _loss(e),
                e.reason,
            ]
            for e in plan.entries
        ),
    )
    reasons: dict[str, tuple[int, int]] = {}
    for entry in plan.dense:
        count, numbers = reasons.get(entry.reason, (0, 0))
        reasons[entry.reason] = (count + 1, numbers + entry.numbers)
    table(
        "Left as they are",
        ["why", "weights", "parameters"],
        ([r, str(c), millions(n)] for r, (c, n) in reasons.items()),
    )
    print_sizes(plan)
    if plan.predicted_divergence is not None:
        console.print(
            f"Predicted divergence from the original: {plan.predicted_divergence:.4f} nats per token (second order)."
        )
    for note in plan.notes:
        console.print(f"Note: {escape(note)}.")


def _rank(entry: PlanEntry) -> str:
    return "dense" if entry.rank is None else str(entry.rank)


def _loss(entry: PlanEntry) -> str:
    return "–" if entry.predicted_loss is None else f"{entry.predicted_loss:.3g}"


def print_run(run: Run, plan: Plan, out: Path) -> None:
    """What a compress run did, cost and gained."""
    kinds: dict[str, list[PlanEntry]] = {}
    for entry in plan.entries:
        kinds.setdefault(entry.kind, []).append(entry)
    table(
        "Ranks by kind",
        ["kind", "weights", "lowest rank", "mean rank", "highest", "dense", "kept"],
        (
            [
                kind,
                str(len(group)),
                *_spread([e.rank for e in group if e.rank is not None]),
                str(sum(e.rank is None for e in group)),
                f"{sum(e.numbers_after for e in group) / sum(e.numbers_before for e in group):.1%}",
            ]
            for kind, group in kinds.items()
        ),
    )
    print_sizes(plan)
    if run.quality is not None:
        q = run.quality
        table(
            f"Quality on {q.text} ({q.windows} windows of {q.window} tokens)",
            ["", "original", "factored"],
            [
                ["perplexity", f"{q.original['perplexity']:.2f}", f"{q.factored['perplexity']:.2f}"],
                ["divergence from the original, nats per token", "–", f"{q.factored['divergence']:.4f}"],
                ["same most likely token", "–", f"{q.factored['agreement']:.1%}"],
            ],
        )
    for sample in run.samples:
        console.print(f"[bold]{escape(sample.prompt)}[/bold]")
        console.print(f"  original: {escape(sample.original.strip())}")
        console.print(f"  factored: {escape(sample.factored.strip())}")
    for note in run.notes:
        console.print(f"Note: {escape(note)}.")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run.seconds.items() if seconds >= 0.5)
    console.print(f"Time: {spent}. Peak memory: {run.peak_memory / 2**30:.2f} GiB.")
    console.print(f"Checkpoint: {out}", highlight=False, soft_wrap=True)
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)


def _spread(ranks: list[int]) -> list[str]:
    if not ranks:
        return ["–", "–", "–"]
    return [str(min(ranks)), f"{sum(ranks) / len(ranks):.0f}", str(max(ranks))]


def print_inspection(found: Inspection, every: bool) -> None:
    """The weights of a model, by kind or one by one."""
    if every:
        table(
            found.model,
            ["weight", "shape", "parameters", "what", "shares its input with"],
            ([w.name, " × ".join(map(str, w.shape)), f"{w.numbers:,}", w.what, w.group or ""] for w in found.weights),
        )
    else:
        kinds: dict[tuple[str, str, str], tuple[int, int]] = {}
        for w in found.weights:
            key = (w.kind, " × ".join(map(str, w.shape)), w.what)
            count, numbers = kinds.get(key, (0, 0))
            kinds[key] = (count + 1, numbers + w.numbers)
        table(
            found.model,
            ["kind", "shape", "what", "weights", "parameters"],
            (
                [kind, shape, what, str(count), millions(numbers)]
                for (kind, shape, what), (count, numbers) in kinds.items()
            ),
            left=3,
        )
        if found.shared:
            console.print("Weights that share an input: " + "; ".join(escape(s) for s in found.shared) + ".")
    share = found.target_numbers / found.total_numbers
    console.print(
        f"{found.architecture}: {millions(found.total_numbers)} parameters, of which {millions(found.target_numbers)} "
        f"({share:.1%}) {'are' if not found.factored else 'are or were'} in weights that can be factorized."
    )


def print_evaluation(result: Evaluation) -> None:
    """The models side by side."""
    many = len(result.models) > 1
    table(
        f"{result.text}: {result.windows} windows of {result.window} tokens",
        [
            "model",
            "perplexity",
            *(["× original", "divergence", "same token"] if many else []),
            "parameters",
            "memory",
            "disk",
        ],
        (
            [
                m.name,
                f"{m.perplexity:.3f}",
                *(
                    [
                        f"{m.perplexity / result.models[0].perplexity:.4f}",
                        _number(m.divergence, ".4f"),
                        _number(m.agreement, ".1%"),
                    ]
                    if many
                    else []
                ),
                millions(m.parameters),
                megabytes(m.memory),
                megabytes(m.disk),
            ]
            for m in result.models
        ),
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
