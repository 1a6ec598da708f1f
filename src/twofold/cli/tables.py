"""What the subcommands print with: tables, sizes, notes and where files are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from unicodedata import category

import pydantic
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from twofold.cli.words import with_flags
from twofold.host.progress import duration

if TYPE_CHECKING:
    from twofold.planning.plan import Plan
    from twofold.report.record import Run, Sample
    from twofold.tuning.record import TuneRun


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command end as for any output that nobody reads; rich's own way is exit code 1."""
        raise BrokenPipeError


console = _Console()
WIDEST, SENTENCE = 1000, 30  # letters of a table, and of its sentences beside the longest of their words
Key = TypeVar("Key", bound=Hashable)


def plain(text: str) -> str:
    """Return text from a model or from data as itself: no markup, and nothing else that a terminal obeys."""
    return escape("".join(sign if sign in "\n\t" or category(sign) not in ("Cc", "Cs") else "\ufffd" for sign in text))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> None:
    """Print a table of words and numbers; the columns after the first ``left`` stand to the right.

    No name is cut: where all words fit, sentences give way first, and in a narrow terminal a name goes on in the next line.
    What is no terminal is as wide as the words need.
    """
    grid = Table(title=plain(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(plain(str(cell)) for cell in row))
    needed = Measurement.get(console, console.options.update(max_width=WIDEST), grid).minimum + SENTENCE
    grid.columns[0].no_wrap = needed <= console.width or not console.is_terminal
    shown = console if console.is_terminal else _Console(width=max(console.width, needed))
    shown.print(grid)


def tell(text: str, *, wrap: bool = True) -> None:
    """Print a sentence, which may have markup, on one line or wrapped to the width of the terminal."""
    console.print(text, soft_wrap=not wrap)


def millions(numbers: float) -> str:
    return f"{numbers / 1e6:.2f}M"


def megabytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e6:.1f} MB"


def number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else format(value, form) + unit


def tally(weights: Iterable[tuple[Key, int]]) -> dict[Key, tuple[int, int]]:
    """Count weights of each kind, and sum their numbers."""
    sums: dict[Key, tuple[int, int]] = {}
    for key, numbers in weights:
        count, total = sums.get(key, (0, 0))
        sums[key] = count + 1, total + numbers
    return sums


def run_command(function: Callable[..., Any], flags: dict[str, Any], show: Callable[[Any], None]) -> None:
    """Call a public function with the flags of the command of its name, and print its record."""
    as_json = flags.pop("json_output")
    print_record(function(**flags), as_json, show)


def print_record(record: pydantic.BaseModel, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print a record as JSON, or show it."""
    if as_json:
        print(record.model_dump_json(indent=1))
    else:
        show(record)


def print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        tell(f"Note: {plain(with_flags(note))}.", wrap=False)


def print_explanation(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        tell(f"• {plain(with_flags(sentence))}", wrap=True)


def print_place(what: str, place: Path) -> None:
    console.print(f"{what}: {plain(str(place))}", highlight=False, soft_wrap=True)


def print_samples(samples: Iterable[Sample], before: str, after: str) -> None:
    """Print what two models answer, each under its name."""
    for sample in samples:
        tell(f"[bold]{plain(sample.prompt[-300:].strip())}[/bold]")
        tell(f"  {before}: {plain(sample.original.strip())}")
        tell(f"  {after}: {plain(sample.factored.strip())}")


def print_end(run: Run | TuneRun, places: Mapping[str, Path]) -> None:
    """Print the notes of a run, what it took, and where its files are."""
    print_notes(run.notes)
    spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in run.seconds.items() if seconds >= 0.5)
    tell(f"Time: {spent}. Peak memory: {run.peak_memory / 2**30:.2f} GiB.")
    for what, place in places.items():
        print_place(what, place)


def print_sizes(plan: Plan) -> None:
    """Print both numbers for size: over the targeted weights and over the whole model, in parameters and bytes."""
    targets, model = "factorized weights", "whole model"
    bytes_before, bytes_after = plan.target_bytes_before, plan.bytes_after - plan.dense_bytes
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        (f"{targets}, parameters", plan.target_before, plan.target_after, millions),
        (f"{model}, parameters", plan.model_before, plan.model_after, millions),
        (f"multiplications a token, {targets}", plan.target_before, plan.multiplications_after, millions),
        (f"{targets}, bytes", bytes_before, bytes_after, megabytes),
        (f"{model}, bytes", plan.bytes_before, plan.bytes_after, megabytes),
    ]
    if plan.latency is not None:
        before = sum(entry.dense_microseconds or 0 for entry in plan.entries)
        after = sum(entry.microseconds or 0 for entry in plan.entries)
        rows.append((f"time for one token, {targets}, as measured", before, after, lambda t: f"{t / 1e3:.2f} ms"))
    cells = ([name, show(before), show(after), f"{after / before:.2%}"] for name, before, after, show in rows)
    table("Size", ["", "before", "after", "kept"], cells)
