"""A figure beside the bar that it is held against, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """One figure and what it is held against."""

    name: str
    bar: str
    figure: str
    met: bool


def table(bars: Iterable[Bar]) -> list[str]:
    """The lines of a Markdown table."""
    rows = [f"| {b.name} | {b.bar} | {b.figure} | {'yes' if b.met else '**no**'} |" for b in bars]
    return ["| figure | bar | measured | met |", "|---|---|---|---|", *rows]
