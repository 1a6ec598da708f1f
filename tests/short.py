"""What takes most of the time of a tiny run, and is of no interest to most tests, left out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twofold.evidence.beside import Beside

NO_FIGURES = dict.fromkeys(("heatmap", "spectra", "sizes", "scatter", "by_kind", "by_layer"))


def shorten(put: Callable[[str, Any], object]) -> None:
    """Leave the figures and the live part out of the page, and the sample answers at two tokens.

    Args:
        put: gives a name, with its module, another value.
    """
    put("twofold.report.page._figures", lambda *_: NO_FIGURES | {"spectra": ()})
    put("twofold.report.explorer.explorer_data", lambda *_: None)
    put("twofold.run.compress.measure_beside", lambda *_: Beside())
    put("twofold.run.ways.SAMPLE_TOKENS", 2)
    put("twofold.tuning.samples.TOKENS", 2)
