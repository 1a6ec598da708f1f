"""The rows of files and data sets, each checked, with the place that it came from: one reader for all commands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from twofold.errors import TwofoldError
from twofold.task.text.formats import read_row
from twofold.task.text.row import BadRowError, Row, Tally
from twofold.task.text.sources import Sources


def rows_of(names: Iterable[str], sources: Sources, *, column: str, chat: bool, skip_bad: bool) -> Iterator[Row]:
    """Yield the rows of all sources; what is left out is counted in their tally.

    Args:
        column: the field with the text, where it is none that the formats know.
        chat: put a prompt and its completion as one turn each.

    Raises:
        TwofoldError: naming the place of the first bad row and what it lacks, unless bad rows are to be skipped; or if a source
            can't be read.
    """
    tally = sources.tally
    missing = column if column != "text" else None
    for name in names:
        for where, value in sources.values(name):
            if isinstance(value, dict) and missing:
                missing = None if column in value else missing
                tally.column = missing
            try:
                if isinstance(value, BadRowError):
                    raise value
                row = value if isinstance(value, Row) else read_row(value, where, column)
            except BadRowError as error:
                tally.refuse(f"{where}: {error}", skip=skip_bad)
                continue
            if not row.turns and not (row.prompt + row.completion).strip():
                tally.blank += 1
                continue
            tally.unread.update(row.unread)
            yield row.chat if chat else row


def no_rows(
    names: Iterable[object], tally: Tally, what: str = "rows", instead: str = "a file with one JSON object on each line"
) -> TwofoldError:
    """Return the error of sources that hold no row."""
    blank = f"{tally.blank} without any text" if tally.blank else ""
    bad = f"{tally.skipped} bad ones, first {tally.first_skipped}" if tally.skipped else ""
    but = f" but {' and '.join(filter(None, (blank, bad)))}" if blank or bad else ""
    return TwofoldError(f"there are no {what} in {', '.join(map(str, names))}{but}; name {instead}")
