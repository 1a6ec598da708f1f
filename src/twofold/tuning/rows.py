"""Rows to learn from: those of all sources, in memory."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.task.text.row import Row, Tally
from twofold.task.text.rows import no_rows, rows_of
from twofold.task.text.sources import Sources


@dataclass(frozen=True)
class Rows:
    """The rows of all sources, and what was left out."""

    rows: list[Row]
    tally: Tally

    @property
    def skipped(self) -> int:
        """Return how many bad rows were left out."""
        return self.tally.skipped

    @property
    def first_skipped(self) -> str:
        """Return the place of the first of them, and what was wrong."""
        return self.tally.first_skipped


def read_rows(
    sources: list[str],
    *,
    skip_bad: bool = False,
    chat: bool = False,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    text_column: str = "text",
) -> Rows:
    """Read and check all rows.

    Raises:
        TwofoldError: naming the place of the first bad row and what it lacks, unless bad rows are to be skipped; or if a source
            can't be read, or there is no row.
    """
    tally = Tally()
    read = Sources(dataset_config, dataset_split, tally)
    rows = list(rows_of(sources, read, column=text_column, chat=chat, skip_bad=skip_bad))
    if not rows:
        raise no_rows(sources, tally)
    return Rows(rows, tally)
