"""The record of a comparison: a row for every cell, for the dense model and for the baselines. Kept as compare.json."""

from __future__ import annotations

import math
from typing import Literal

import pydantic

from twofold.host.clock import Machine
from twofold.refine import Refined
from twofold.version import __version__


class Text(pydantic.BaseModel, extra="forbid"):
    """What was measured on."""

    name: str
    domain: Literal["in", "out"]  # of the calibration's kind, or of another
    windows: int
    window: int  # tokens
    size: str = ""  # in words, where it is no windows
    sha256: str  # of what the model is given
    begin: str = ""  # the special tokens that each window begins with

    @property
    def words(self) -> str:
        return f"{self.name} ({self.place})"

    @property
    def measured(self) -> str:
        """How much was measured on, in words."""
        return self.size or f"{self.windows} windows of {self.window:,} tokens"

    @property
    def place(self) -> str:
        return "in-domain" if self.domain == "in" else "out-of-domain"


class ComparisonRow(pydantic.BaseModel, extra="forbid"):
    """One model. A row that was skipped has a reason in the place of figures."""

    name: str
    kind: Literal["dense", "factored", "quantized"]
    objective: str | None = None
    allocate: str | None = None
    refine: str | None = None  # names with + between
    asked: float | None = None  # the keep ratio that was asked for
    keep: float | None = None  # share of the targeted weights' parameters
    keep_model: float | None = None  # share of the whole model's parameters
    parameters: int | None = None  # numbers stored for weights, scales not counted
    bytes: int | None = None  # of the whole model as it is stored
    bytes_16: int | None = None  # the same, were its floating-point numbers of 16 bits
    perplexity: list[float] = []  # on each text, in their order
    ratio: list[float] = []  # to the dense model's
    divergence: float | None = None  # on the first text, KL(dense ‖ this) in nats a prediction
    divergences: list[float] = []  # on each text, of tasks without a perplexity
    scores: list[dict[str, float]] = []  # the task's own measures on each text, those that are finite
    predicted_divergence: float | None = None  # before refinement
    seconds: dict[str, float] = {}  # factorize, refine, measure; decompose and calibrate of all rows that share them
    refinement: list[Refined] = []
    fingerprint: str = ""  # of the moments that it was made from
    notes: list[str] = []
    skipped: str | None = None  # why it was not measured

    @property
    def method(self) -> str:
        """What a line of the figure joins: all but the keep ratio."""
        return self.name if self.kind != "factored" else f"{self.objective}, {self.allocate}, {self.refine}"

    def on(self, text: int) -> float:
        """Return the number that rows are compared by on a text, the lower the better."""
        return self.perplexity[text] if self.perplexity else self.divergences[text]

    @property
    def megabytes_16(self) -> float:
        """The size at which rows are compared."""
        return (self.bytes_16 or 0) / 1e6


class Comparison(pydantic.BaseModel, extra="forbid"):
    """A whole comparison."""

    version: str = __version__
    command: str
    model: str
    machine: Machine
    seed: int
    calibration: str  # in words
    calibration_tokens: int
    unit: str = "tokens"  # that it is counted in
    prediction: str = "token"  # what one is called
    calibration_sha256: str
    fingerprint: str  # of the moments; empty if no objective needs any
    texts: list[Text]
    rows: list[ComparisonRow]
    seconds: dict[str, float] = {}  # of what all cells share
    notes: list[str] = []

    @property
    def dense(self) -> ComparisonRow:
        """The row of the model before factorization."""
        return self.rows[0]

    @property
    def measure(self) -> str:
        """What rows are compared by."""
        return "perplexity" if self.dense.perplexity else "divergence"

    def measures(self, text: int) -> list[str]:
        """Return the names of what is measured on a text."""
        return ["perplexity", "ratio"] if self.dense.perplexity else ["divergence", *self.dense.scores[text]]

    def figures(self, row: ComparisonRow, text: int) -> list[float]:
        """Return what was measured of a row on a text, in the order of ``measures``; NaN for a score that it lacks."""
        if self.dense.perplexity:
            return [row.perplexity[text], row.ratio[text]]
        return [row.divergences[text], *(row.scores[text].get(name, math.nan) for name in self.dense.scores[text])]

    @property
    def skipped(self) -> dict[str, list[str]]:
        """The rows that were not measured, by their reason."""
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            if row.skipped is not None:
                reasons.setdefault(row.skipped, []).append(row.name)
        return reasons

    @property
    def measured(self) -> list[ComparisonRow]:
        return [row for row in self.rows if row.skipped is None]

    def front(self, text: int) -> list[ComparisonRow]:
        """Find the rows that no other beats in both size and quality on a text, from the smallest on."""
        best: list[ComparisonRow] = []
        for row in sorted(self.measured, key=lambda row: (row.bytes_16 or 0, row.on(text))):
            if not best or row.on(text) < best[-1].on(text):
                best.append(row)
        return best
