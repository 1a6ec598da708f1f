"""A comparison as CSV and as Markdown."""

from __future__ import annotations

import csv
import io

from twofold.comparison.record import Comparison, Row
from twofold.report.formats import NONE, count, number

MEGA = 1e6


def csv_table(comparison: Comparison) -> str:
    """One line a row, every figure in full."""
    texts = [f"{kind} {text.words}" for text in comparison.texts for kind in ("perplexity", "ratio")]
    columns = (
        "name", "kind", "objective", "allocate", "refine", "asked", "keep", "keep_model", "parameters", "bytes", "bytes_16",
        "divergence", "predicted_divergence",
    )  # fmt: skip
    stages = ("calibrate", "decompose", "factorize", "refine", "measure")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*columns, *texts, *(f"seconds {stage}" for stage in stages), "skipped", "notes"])
    for row in comparison.rows:
        figures = [
            value
            for i in range(len(comparison.texts))
            for value in ((row.perplexity[i], row.ratio[i]) if row.skipped is None else ("", ""))
        ]
        cells = [getattr(row, column) for column in columns]
        writer.writerow(
            ["" if cell is None else cell for cell in cells]
            + figures
            + [row.seconds.get(stage, "") for stage in stages]
            + [row.skipped or "", "; ".join([*row.notes, *(one.words for one in row.refinement)])]
        )
    return buffer.getvalue()


def heads(comparison: Comparison) -> list[str]:
    """The columns of the table that people read."""
    texts = [head for text in comparison.texts for head in (f"perplexity, {text.name}", "× dense")]
    return [
        "method", "refined by", "keep asked", "kept of the weights", "kept of the model", "MB stored", "MB in 16 bits", *texts,
        "divergence", "predicted", "seconds",
    ]  # fmt: skip


def lines(comparison: Comparison) -> list[list[str]]:
    """The cells of that table, those that were skipped left out."""
    return [_line(row) for row in comparison.measured]


def _line(row: Row) -> list[str]:
    factored = row.kind == "factored"
    spent = sum(seconds for stage, seconds in row.seconds.items() if stage in ("factorize", "refine"))
    return [
        f"{row.objective}, {row.allocate}" if factored else row.name,
        (row.refine or "none") if factored else NONE,
        f"{row.asked:g}" if row.asked is not None else NONE,
        f"{row.keep:.2%}" if factored else NONE,
        f"{row.keep_model:.2%}" if factored else NONE,
        f"{(row.bytes or 0) / MEGA:,.1f}",
        f"{(row.bytes_16 or 0) / MEGA:,.1f}",
        *(cell for i in range(len(row.perplexity)) for cell in (number(row.perplexity[i], 4), f"{row.ratio[i]:.3f}")),
        f"{row.divergence:.4f}" if row.divergence is not None else NONE,
        f"{row.predicted_divergence:.4f}" if row.predicted_divergence is not None else NONE,
        f"{spent:.0f}" if factored else NONE,
    ]


def explained(comparison: Comparison) -> str:
    """How to read the table, in one paragraph."""
    first = comparison.texts[0].name
    quantized = any(row.kind == "quantized" for row in comparison.rows)
    return (
        "Lower perplexity at fewer megabytes is better: “MB in 16 bits” is the whole model with its floating-point numbers in "
        "16 bits, so that rows can be compared at equal bytes"
        + (" with quantization, which stores its weights in 8 or 4 bits and its scales in 16" if quantized else "")
        + "; “MB stored” has them in the precision of the checkpoint, in which the quality was measured. Divergence is "
        f"KL(dense ‖ row) in nats per token on {first}, the prediction is made before refinement, and seconds are those of the "
        "factors and their refinement; what all rows of an objective share, calibration and decompositions, is in the list "
        "above the table."
    )


def markdown(comparison: Comparison) -> str:
    """The table with all that its figures depend on."""
    c, machine = comparison, comparison.machine
    shared = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in c.seconds.items() if seconds >= 0.5)
    decomposed = {row.objective: row.seconds["decompose"] for row in c.measured if "decompose" in row.seconds}
    parts = [
        f"# {_plain(c.model)}",
        "```bash\n" + c.command + "\n```",
        "\n".join(
            [
                f"- twofold {c.version}, torch {machine.torch}, transformers {machine.transformers}, Python {machine.python}",
                f"- {machine.system}, {machine.device}, {machine.threads} threads, {machine.dtype}; seed {c.seed}",
                f"- calibrated on {_plain(c.calibration)}, {count(c.calibration_tokens)} tokens, sha256 of the token ids "
                f"`{c.calibration_sha256 or NONE}`",
                *(
                    f"- measured {text.place} on {_plain(text.name)}, {text.windows} windows of {count(text.window)} "
                    f"tokens, each scored alone, sha256 of the token ids `{text.sha256}`"
                    for text in c.texts
                ),
                f"- shared by all rows: {shared or 'under a second'}; decompositions: "
                + (", ".join(f"{name} {seconds:.0f} s" for name, seconds in decomposed.items()) or "none"),
            ]
        ),
        _table(heads(c), lines(c)),
        explained(c),
        "![Perplexity against stored size](compare.png)",
    ]
    skipped = [f"- {_plain('; '.join(names))}: {_plain(reason)}" for reason, names in c.skipped.items()]
    if skipped:
        parts.append("Not measured:\n\n" + "\n".join(skipped))
    said: dict[str, list[str]] = {}
    for row in c.measured:
        for note in row.notes:
            said.setdefault(note, []).append(row.name)
    notes = [f"- {_plain(note)}" for note in c.notes]
    notes += [f"- {_plain(note)} ({_rows(names)})" for note, names in said.items()]
    if any(row.refinement for row in c.measured):
        notes.append(
            "- what each refinement did, and the held-out loss before and after it, is in compare.json and compare.csv"
        )
    if notes:
        parts.append("Notes:\n\n" + "\n".join(notes))
    return "\n\n".join(parts) + "\n"


def _rows(names: list[str]) -> str:
    """Which rows a note is about."""
    return _plain("; ".join(names)) if len(names) < 4 else f"{_plain(names[0])} and {len(names) - 1} more rows"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    made = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in made)


def _plain(text: str) -> str:
    """Words without what Markdown reads as a table or as a line of its own."""
    return " ".join(text.split()).replace("|", "\\|")
