"""A comparison as CSV and as Markdown."""

from __future__ import annotations

import csv
import io

from twofold.comparison.record import Comparison, ComparisonRow
from twofold.report.formats import NONE, count, duration, number

COLUMNS = (
    "name", "kind", "objective", "allocate", "refine", "asked", "keep", "keep_model", "parameters", "bytes", "bytes_16",
    "divergence", "predicted_divergence",
)  # fmt: skip
STAGES = ("calibrate", "decompose", "factorize", "refine", "measure")


def csv_table(comparison: Comparison) -> str:
    """Write one line a row, every figure in full."""
    texts = [f"{kind} {text.words}" for i, text in enumerate(comparison.texts) for kind in comparison.measures(i)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*COLUMNS, *texts, *(f"seconds {stage}" for stage in STAGES), "skipped", "notes"])
    for row in comparison.rows:
        figures: list[float | str] = [""] * len(texts)
        if row.skipped is None:
            figures = [figure for i in range(len(comparison.texts)) for figure in comparison.figures(row, i)]
        writer.writerow(
            [getattr(row, column) for column in COLUMNS]
            + figures
            + [row.seconds.get(stage, "") for stage in STAGES]
            + [row.skipped or "", "; ".join([*row.notes, *(step.words for step in row.refinement)])]
        )
    return buffer.getvalue()


def _measured(comparison: Comparison, row: ComparisonRow) -> list[str]:
    """Return what was measured of a row on all texts."""
    figures = [comparison.figures(row, i) for i in range(len(comparison.texts))]
    if comparison.measure == "divergence":
        return [number(figure, 4) for measured in figures for figure in measured]
    divergence = f"{row.divergence:.4f}" if row.divergence is not None else NONE
    return [*(cell for now, ratio in figures for cell in (number(now, 4), f"{ratio:.3f}")), divergence]


def _cells(comparison: Comparison, row: ComparisonRow) -> list[str]:
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
        *_measured(comparison, row),
        f"{row.predicted_divergence:.4f}" if row.predicted_divergence is not None else NONE,
        f"{spent:.0f}" if factored else NONE,
    ]  # fmt: skip


def _explained(comparison: Comparison) -> str:
    """Say how to read the table, in one paragraph."""
    quantized = any(row.kind == "quantized" for row in comparison.rows)
    measure = comparison.measure
    where = f" on {comparison.texts[0].name}" if measure == "perplexity" else ""
    return (
        f"Lower {measure} at fewer megabytes is better: “MB in 16 bits” is the whole model with its floating-point numbers in "
        "16 bits, so that rows can be compared at equal bytes"
        + (" with quantization, which stores its weights in 8 or 4 bits and its scales in 16" if quantized else "")
        + "; “MB stored” has them in the precision of the checkpoint, in which the quality was measured. Divergence is "
        f"KL(dense ‖ row) in nats per {comparison.prediction}{where}, the prediction is made before refinement, and "
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
    ids = "the token ids" if c.unit == "tokens" else "what the model is given"
    facts = [
        f"- twofold {c.version}, torch {machine.torch}, transformers {machine.transformers}, Python {machine.python}",
        f"- {machine.system}, {machine.device}, {machine.threads} threads, {machine.dtype}; seed {c.seed}",
        f"- calibrated on {_plain(c.calibration)}, {count(c.calibration_tokens)} {c.unit}, sha256 of {ids} "
        f"`{c.calibration_sha256 or NONE}`",
        *(
            f"- measured {text.place} on {_plain(text.name)}, {text.measured}, each scored alone, sha256 of {ids} `{text.sha256}`"
            for text in c.texts
        ),
        f"- shared by all rows: {shared or 'under a second'}; decompositions: {decomposed or 'none'}",
    ]
    texts = [f"{name.replace('_', ' ')}, {text.name}" for i, text in enumerate(c.texts) for name in c.measures(i)]
    if c.dense.perplexity:
        texts = [column for text in c.texts for column in (f"perplexity, {text.name}", "× dense")] + ["divergence"]
    columns = [
        "method", "refined by", "keep asked", "kept of the weights", "kept of the model", "MB stored", "MB in 16 bits", *texts,
        "predicted", "seconds",
    ]  # fmt: skip
    table = [columns, ["---"] * len(columns), *(_cells(c, row) for row in c.measured)]
    parts = [
        f"# {_plain(c.model)}",
        "```bash\n" + c.command + "\n```",
        "\n".join(facts),
        "\n".join("| " + " | ".join(map(_plain, row)) + " |" for row in table),
        _explained(c),
        f"![{c.measure.capitalize()} against stored size](compare.png)",
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
    return ", ".join(f"{name} {duration(spent)}" for name, spent in seconds.items())


def _plain(text: str) -> str:
    """Return words without what Markdown reads as a table or as a line of its own."""
    return " ".join(text.split()).replace("|", "\\|")
