"""Figures in files of their own, on white paper: no page lends them its colours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from twofold.report.drawing import GRID, INK, SETTINGS

PRINT = {INK: "#222222", GRID: "#dddddd"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers too


@contextmanager
def on_paper(salt: str) -> Iterator[None]:
    """Let figures be made and saved in the colours of paper within the block.

    Args:
        salt: of the identifiers in an SVG, so that the same figure is the same file.
    """
    settings = {key: PRINT.get(value, value) if isinstance(value, str) else value for key, value in SETTINGS.items()}
    settings |= {"figure.facecolor": "white", "svg.hashsalt": salt}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks
        yield


def save_printed(figure: Figure, paths: list[Path]) -> None:
    """Save a figure into files; their suffixes say how."""
    for path in paths:
        described = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.15, metadata=described)
