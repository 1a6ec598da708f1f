"""What the subcommands print with: tables, sizes, notes and where files are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import category

import pydantic
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twofold.cli.words import with_flags

if TYPE_CHECKING:
    from twofold.planning.plan import Plan

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


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def answer(record: pydantic.BaseModel, as_json: bool, show: Callable[[], None]) -> None:
    """Print a record as JSON, or show it."""
    if as_json:
        print(record.model_dump_json(indent=1))
    else:
        show()


def print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        console.print(f"Note: {plain(with_flags(note))}.", soft_wrap=True)


def print_place(what: str, place: Path) -> None:
    console.print(f"{what}: {plain(str(place))}", highlight=False, soft_wrap=True)


def print_spent(notes: list[str], seconds: dict[str, float], peak_memory: float) -> None:
    """The notes of a run, and what it took."""
    print_notes(notes)
    spent = ", ".join(f"{name} {took:.0f} s" for name, took in seconds.items() if took >= 0.5)
    console.print(f"Time: {spent}. Peak memory: {peak_memory / 2**30:.2f} GiB.")


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
