"""How a figure is drawn and put into the page: as inline SVG in the colours of the page, light or dark.

Text and lines are drawn in marker colours that the page's own colours take the place of. Nothing is read as
mathematics or markup, so a name from a model can do no harm.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, ParamSpec

import matplotlib
from markupsafe import Markup, escape
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from twofold.report.formats import power_of_ten

INK, GRID, PAPER, BEFORE, AFTER = "#010203", "#010204", "#010205", "#010206", "#010207"
PAGE_COLOURS = {  # marker → the page's own
    INK: "currentColor",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
}
DEPTH = (0.28, 0.86)  # the part of viridis that is seen on light and on dark
SETTINGS = {
    "axes.edgecolor": INK, "axes.facecolor": "none", "axes.labelcolor": INK, "axes.linewidth": 0.6,
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.labelsize": 11, "font.family": ["DejaVu Sans"], "font.size": 11, "figure.facecolor": "none",
    "grid.color": GRID, "grid.linewidth": 0.6, "svg.fonttype": "none", "text.color": INK, "text.parse_math": False,
    "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "xtick.major.size": 3, "ytick.major.size": 3, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
}  # fmt: skip
Args = ParamSpec("Args")


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """Make a figure whose plot area has this size in pixels, and its axes; labels stand outside of it."""
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axisbelow(True)
    return figure, axes


def inline(draw: Callable[Args, tuple[Any, str]]) -> Callable[Args, Markup]:
    """Turn a function that gives a figure and the words for it into one that gives inline SVG."""

    @wraps(draw)
    def drawn(*args: Args.args, **kwargs: Args.kwargs) -> Markup:
        with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a glyph that matplotlib's font lacks: the browser has it
            figure, words = draw(*args, **kwargs)
            with matplotlib.rc_context({"svg.hashsalt": words}):
                buffer = io.StringIO()
                figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.05, transparent=True)
        return page_svg(buffer.getvalue(), words)

    return drawn


def page_svg(svg: str, words: str) -> Markup:
    """Turn matplotlib's SVG file into an element of the page: no prologue, no addresses, and the page's colours."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*">', "<g>", body).replace("xlink:href", "href")
    body = re.sub(r"\n\s*", "\n", body)
    for marker, colour in PAGE_COLOURS.items():
        body = body.replace(marker, colour)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None
    width, height = (math.ceil(float(size)) for size in box.groups())
    return Markup(  # what matplotlib wrote: it escapes all text
        f'<svg viewBox="0 0 {box[1]} {box[2]}" style="--width: {width}px; --height: {height}px" '
        f'role="img" aria-label="{escape(words)}">{body}'
    )


def label_of(name: str, longest: int = 34) -> str:
    """Shorten a name so that it fits beside a figure."""
    name = " ".join(name.split())
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-(longest // 2) :]}"


def log_scale(axes: Any, which: Literal["x", "y"], low: float, high: float) -> None:
    """Make an axis logarithmic, with its powers of ten written as such."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    decades = max(math.ceil(math.log10(high / low)), 1)
    axis.set_major_locator(LogLocator(base=10, numticks=8 if decades < 8 else 6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(round(math.log10(max(value, 1e-300))))))


def depth_colour(position: float) -> str:
    """Return the colour of a depth in the model from 0, the first layer, to 1, the last."""
    return str(to_hex(matplotlib.colormaps["viridis"](DEPTH[0] + (DEPTH[1] - DEPTH[0]) * position)))


def share_colour(value: float) -> str:
    """Return the colour of a share from 0 to 1."""
    return str(to_hex(matplotlib.colormaps["cividis"](min(max(value, 0.0), 1.0))))


def gradient(colour: Callable[[float], str]) -> str:
    """Return the CSS of a colour scale, for a legend."""
    return "linear-gradient(to right, " + ", ".join(colour(i / 8) for i in range(9)) + ")"
