"""A comparison as CSV and as Markdown."""

from __future__ import annotations

import csv
import io

from twofold.comparison.record import Comparison, ComparisonRow
from twofold.report.formats import NONE, count, number

COLUMNS = (
    "name", "kind", "objective", "allocate", "refine", "asked", "keep", "keep_model", "parameters", "bytes", "bytes_16",
    "divergence", "predicted_divergence",
)  # fmt: skip
STAGES = ("calibrate", "decompose", "factorize", "refine", "measure")


def csv_table(comparison: Comparison) -> str:
    """Write one line a row, every figure in full."""
    texts = [f"{kind} {text.words}" for text in comparison.texts for kind in ("perplexity", "ratio")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*COLUMNS, *texts, *(f"seconds {stage}" for stage in STAGES), "skipped", "notes"])
    for row in comparison.rows:
        figures = [figure for pair in zip(row.perplexity, row.ratio, strict=True) for figure in pair]
        writer.writerow(
            [getattr(row, column) for column in COLUMNS]
            + (figures if row.skipped is None else [""] * len(texts))
            + [row.seconds.get(stage, "") for stage in STAGES]
            + [row.skipped or "", "; ".join([*row.notes, *(step.words for step in row.refinement)])]
        )
    return buffer.getvalue()


def _cells(row: ComparisonRow) -> list[str]:
    """Return the cells of a row in the table that people read."""
    factored = row.kind == "factored"
    spent = row.seconds.get("factorize", 0) + row.seconds.get("refine", 0)
    return [
        f"{row.objective}, {row.allocate}" if factored else row.name,
        (row.refine or "none") if factored else NONE,
        f"{row.asked:g}" if row.asked is not None else NONE,
        f"{row.keep:.2%}" if factored else NONE,
        f"{row.keep_model:.2%}" if factored else NONE,
        f"{(row.bytes or 0) / 1e6:,.1f}",
        f"{row.megabytes_16:,.1f}",
        *(cell for now, ratio in zip(row.perplexity, row.ratio, strict=True) for cell in (number(now, 4), f"{ratio:.3f}")),
        f"{row.divergence:.4f}" if row.divergence is not None else NONE,
        f"{row.predicted_divergence:.4f}" if row.predicted_divergence is not None else NONE,
        f"{spent:.0f}" if factored else NONE,
    ]  # fmt: skip


def _explained(comparison: Comparison) -> str:
    """Say how to read the table, in one paragraph."""
    quantized = any(row.kind == "quantized" for row in comparison.rows)
    return (
        "Lower perplexity at fewer megabytes is better: “MB in 16 bits” is the whole model with its floating-point numbers in "
        "16 bits, so that rows can be compared at equal bytes"
        + (" with quantization, which stores its weights in 8 or 4 bits and its scales in 16" if quantized else "")
        + "; “MB stored” has them in the precision of the checkpoint, in which the quality was measured. Divergence is "
        f"KL(dense ‖ row) in nats per token on {comparison.texts[0].name}, the prediction is made before refinement, and "
        "seconds are those of the factors and their refinement; what all rows of an objective share, calibration and "
        "decompositions, is in the list above the table."
    )


def markdown(comparison: Comparison) -> str:
    """Write the table with all that its figures depend on."""
    c, machine = comparison, comparison.machine
    shared = _times({name: seconds for name, seconds in c.seconds.items() if seconds >= 0.5})
    decomposed = _times(
        {str(row.objective): row.seconds["decompose"] for row in c.measured if "decompose" in row.seconds}
    )
    facts = [
        f"- twofold {c.version}, torch {machine.torch}, transformers {machine.transformers}, Python {machine.python}",
        f"- {machine.system}, {machine.device}, {machine.threads} threads, {machine.dtype}; seed {c.seed}",
        f"- calibrated on {_plain(c.calibration)}, {count(c.calibration_tokens)} tokens, sha256 of the token ids "
        f"`{c.calibration_sha256 or NONE}`",
        *(
            f"- measured {text.place} on {_plain(text.name)}, {text.windows} windows of {count(text.window)} "
            f"tokens, each scored alone, sha256 of the token ids `{text.sha256}`"
            for text in c.texts
        ),
        f"- shared by all rows: {shared or 'under a second'}; decompositions: {decomposed or 'none'}",
    ]
    texts = [column for text in c.texts for column in (f"perplexity, {text.name}", "× dense")]
    columns = [
        "method", "refined by", "keep asked", "kept of the weights", "kept of the model", "MB stored", "MB in 16 bits", *texts,
        "divergence", "predicted", "seconds",
    ]  # fmt: skip
    table = [columns, ["---"] * len(columns), *(_cells(row) for row in c.measured)]
    parts = [
        f"# {_plain(c.model)}",
        "```bash\n" + c.command + "\n```",
        "\n".join(facts),
        "\n".join("| " + " | ".join(map(_plain, row)) + " |" for row in table),
        _explained(c),
        "![Perplexity against stored size](compare.png)",
    ]
    skipped = [f"- {_plain('; '.join(names))}: {_plain(reason)}" for reason, names in c.skipped.items()]
    if skipped:
        parts.append("Not measured:\n\n" + "\n".join(skipped))
    notes = _notes(c)
    if notes:
        parts.append("Notes:\n\n" + "\n".join(notes))
    return "\n\n".join(parts) + "\n"


def _notes(comparison: Comparison) -> list[str]:
    """Return the notes of the comparison, and those of its rows with the rows that each is about."""
    rows: dict[str, list[str]] = {}
    for row in comparison.measured:
        for note in row.notes:
            rows.setdefault(note, []).append(row.name)
    notes = [f"- {_plain(note)}" for note in comparison.notes]
    for note, names in rows.items():
        about = "; ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more rows"
        notes.append(f"- {_plain(note)} ({_plain(about)})")
    if any(row.refinement for row in comparison.measured):
        notes.append(
            "- what each refinement did, and the held-out loss before and after it, is in compare.json and compare.csv"
        )
    return notes


def _times(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())


def _plain(text: str) -> str:
    """Return words without what Markdown reads as a table or as a line of its own."""
    return " ".join(text.split()).replace("|", "\\|")
