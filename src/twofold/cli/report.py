"""twofold report: the page of a run again, or several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import twofold
from twofold.cli.flags import Json, Lang
from twofold.cli.tables import megabytes, number, print_place, print_record, table

if TYPE_CHECKING:
    from twofold.report.runs import RunGroup, RunsReport


def command(
    folders: Annotated[list[Path], typer.Argument(help="Outputs of twofold compress.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The page \\[default: runs.html, or report.html in the folder of a single run]."
        ),
    ] = None,
    lang: Lang = "en",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is no such page of Twofold's.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Compare runs on one page: size against quality, a table, how their recipes differ, and what each answers.

    Of a single run, its own report is written again.
    """
    print_record(twofold.report_runs(folders, out=out, lang=lang, overwrite=overwrite), json_output, print_runs)


def print_runs(report: RunsReport) -> None:
    """Print a table for each original, and where the page is."""
    for group in report.groups:
        _print_group(group)
    print_place("Page", Path(report.page))


def _print_group(group: RunGroup) -> None:
    front = set(group.panels[0].front) if len(group.panels) == 1 else set()
    table(
        f"{group.model}: divergence in nats per {group.prediction}",
        ["run", "kept", "size", "predicted", "divergence", "× perplexity", "front"],
        (
            [
                f"{row.number} · {row.name}",
                f"{row.keep:.1%}",
                megabytes(row.bytes),
                number(row.predicted_divergence, ".4f"),
                number(row.divergence, ".4f"),
                number(row.perplexity_ratio, ".3f"),
                "●" if row.number in front else "",
            ]
            for row in group.rows
        ),
    )
