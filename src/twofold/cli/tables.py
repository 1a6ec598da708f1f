"""The tables that the subcommands print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from unicodedata import category

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twofold.cli.words import with_flags
from twofold.comparison.record import Comparison
from twofold.evaluation.side_by_side import Evaluation
from twofold.planning.plan import Estimate, Plan, PlanEntry
from twofold.report.record import Run
from twofold.run.inspect import Inspection
from twofold.run.status import Status

console = Console()


def plain(text: str) -> str:
    """Text from a model or from data as itself: no markup, and nothing else that a terminal obeys."""
    return escape("".join(sign if sign in "\n\t" or category(sign) not in ("Cc", "Cs") else "\ufffd" for sign in text))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table; the columns after the first ``left`` are numbers."""
    made = Table(title=plain(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right")
    for row in rows:
        made.add_row(*(plain(cell) for cell in row))
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
                "multiplications a token, factorized weights",
                millions(plan.target_before),
                millions(plan.multiplications_after),
                f"{plan.multiplications_after / plan.target_before:.2%}",
            ],
            [
                "factorized weights, bytes",
                megabytes(plan.target_before * element),
                megabytes(plan.bytes_after - plan.dense_bytes),
                f"{(plan.bytes_after - plan.dense_bytes) / (plan.target_before * element):.2%}",
            ],
            [
                "whole model, bytes",
                megabytes(plan.bytes_before),
                megabytes(plan.bytes_after),
                f"{plan.bytes_after / plan.bytes_before:.2%}",
            ],
            *(
                [
                    [
                        "time for one token, factorized weights, as measured",
                        f"{sum(e.dense_microseconds or 0 for e in plan.entries) / 1e3:.2f} ms",
                        f"{sum(e.microseconds or 0 for e in plan.entries) / 1e3:.2f} ms",
                        f"{plan.latency:.2%}",
                    ]
                ]
                if plan.latency is not None
                else []
            ),
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
    if plan.estimate is not None:
        print_estimate(plan.estimate)
    for note in plan.notes:
        console.print(f"Note: {plain(with_flags(note))}.")


def print_estimate(estimate: Estimate) -> None:
    """What a run will take."""
    blocks = estimate.blocks_at_once
    how = (
        "the whole model in memory"
        if blocks is None
        else "block by block"
        if blocks == 1
        else f"{blocks} blocks at a time"
    )
    stages = [[name, f"{seconds:.0f} s"] for name, seconds in estimate.seconds.items() if seconds >= 0.5]
    longest = max(estimate.memory, key=lambda name: estimate.memory[name])
    rows = [
        ["how", how],
        ["peak memory", f"{estimate.peak_memory / 2**30:.2f} GiB (to {longest})"],
        ["memory that may be used", f"{estimate.memory_limit / 2**30:.2f} GiB"],
        ["disk while it runs", megabytes(estimate.work_bytes)],
        ["disk for the moments, kept for the next budget", megabytes(estimate.moments_bytes)],
        ["disk for the checkpoint", megabytes(estimate.output_bytes)],
        *stages,
        [
            "time in all",
            f"{estimate.total_seconds / 60:.0f} min"
            if estimate.total_seconds > 120
            else f"{estimate.total_seconds:.0f} s",
        ],
    ]
    table(f"Estimate for this machine, {estimate.threads} threads", ["", ""], rows)


def _rank(entry: PlanEntry) -> str:
    rank = "dense" if entry.rank is None else str(entry.rank)
    return rank if entry.bits is None else f"{rank}, {entry.bits} bits"


def _loss(entry: PlanEntry) -> str:
    return "–" if entry.predicted_loss is None else f"{entry.predicted_loss:.3g}"


def print_spent(notes: list[str], seconds: dict[str, float], peak_memory: float) -> None:
    """The notes of a run, and what it took."""
    for note in notes:
        console.print(f"Note: {plain(with_flags(note))}.")
    spent = ", ".join(f"{name} {took:.0f} s" for name, took in seconds.items() if took >= 0.5)
    console.print(f"Time: {spent}. Peak memory: {peak_memory / 2**30:.2f} GiB.")


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
        console.print(f"[bold]{plain(sample.prompt)}[/bold]")
        console.print(f"  original: {plain(sample.original.strip())}")
        console.print(f"  factored: {plain(sample.factored.strip())}")
    print_spent(run.notes, run.seconds, run.peak_memory)
    console.print(f"Checkpoint: {plain(str(out))}", highlight=False, soft_wrap=True)
    console.print(f"Report: {plain(str(out / 'report.html'))}", highlight=False, soft_wrap=True)


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
            console.print("Weights that share an input: " + "; ".join(plain(s) for s in found.shared) + ".")
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


def print_comparison(comparison: Comparison, out: Path) -> None:
    """Every row that was measured, those that were not with the reason, and where the files are."""
    texts = comparison.texts
    table(
        f"{comparison.model}: perplexity on {', '.join(text.words for text in texts)}",
        ["", "MB", *(text.name for text in texts), "divergence"],
        (
            [
                row.name,
                f"{(row.bytes_16 or 0) / 1e6:,.1f}",
                *(f"{now:.4g}, {ratio:.3f} ×" for now, ratio in zip(row.perplexity, row.ratio, strict=True)),
                _number(row.divergence, ".4f"),
            ]
            for row in comparison.measured
        ),
    )
    for reason, names in comparison.skipped.items():
        console.print(f"Not measured: {plain('; '.join(names))}: {plain(reason)}", soft_wrap=True)
    console.print(
        "MB: the whole model, numbers in 16 bits; ×: over the dense model's; divergence: on the first text, nats per token."
    )
    for note in comparison.notes:
        console.print(f"Note: {plain(with_flags(note))}.")
    console.print(f"Tables and figure: {plain(str(out / 'compare.md'))}", highlight=False, soft_wrap=True)


def print_status(status: Status, removed: bool) -> None:
    """How far a run has come."""
    if status.state == "finished":
        console.print(
            f"finished: {escape(status.model)}, in {status.hours:.2f} h; {escape(status.out)}", soft_wrap=True
        )
        return
    if removed:
        console.print(f"removed: {escape(status.work)} ({megabytes(status.work_bytes)})", soft_wrap=True)
        return
    rows = [
        ["state", f"{status.state}, at: {status.stage}"],
        ["model", status.model],
        ["begun", f"{60 * status.hours:.0f} minutes ago"],
        [
            "calibration",
            "finished" if status.moments_done else f"{status.moments_parts} sweeps over some blocks finished",
        ],
        ["weights decomposed", f"{status.decomposed} of {status.targets or '?'}"],
        *([["models measured to find the size", str(status.measured)]] if status.measured else []),
        ["parts of the checkpoint written", str(status.parts)],
        ["state on disk", megabytes(status.work_bytes)],
        ["moments on disk", megabytes(status.moments_bytes)],
    ]
    table(status.out, ["", ""], rows, left=2)
    console.print(f"State: {escape(status.work)}", soft_wrap=True)
    if status.moments:
        console.print(f"Moments: {escape(status.moments)}", soft_wrap=True)
    if status.finished:
        console.print("A finished checkpoint of an earlier run stands in the folder.")
    if status.state == "stopped":
        console.print("The command that began it goes on from here; twofold status --remove deletes it.")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
