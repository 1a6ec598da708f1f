"""The record of a bench: every round of every measurement, the ratios, the layers, and the machine."""

from __future__ import annotations

import statistics

import pydantic

from twofold.host.clock import Machine
from twofold.model.work import TokenWork


class Timing(pydantic.BaseModel, extra="forbid"):
    """Seconds of each round, and what a round does."""

    seconds: list[float]
    tokens: int = 0  # read or written in a round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Return tokens a second."""
        return self.tokens / self.median


class Row(pydantic.BaseModel, extra="forbid"):
    """One model in one runtime."""

    model: str
    runtime: str
    original: bool  # the one that the others are compared with
    dtype: str
    decode: dict[int, Timing]  # by the number of sequences
    prefill: Timing
    first_token: Timing
    load: Timing
    prepare: float  # seconds to put it into its inference form, and to compile what is compiled before it runs
    memory: int  # bytes of the weights as they run
    peak_memory: int | None  # bytes, resident, of a process that does nothing else
    disk: int | None  # bytes of the weight files
    work: TokenWork | None = None

    def timing(self, what: str) -> Timing:
        """Return the timing of "decode 1", "decode 8", "prefill", "first token", or "load"."""
        kind, _, batch = what.partition(" ")
        return self.decode[int(batch)] if kind == "decode" else getattr(self, what.replace(" ", "_"))  # type: ignore[no-any-return]


class Ratio(pydantic.BaseModel, extra="forbid"):
    """How many times as fast as the original in the same runtime."""

    model: str
    runtime: str
    what: str
    measured: float  # median over rounds of original / model
    ideal: float | None  # bytes moved for decode, multiplications for prefill, bytes on disk for load

    @property
    def share(self) -> float | None:
        """Return the share of the ideal speed-up that is measured."""
        return None if self.ideal is None else self.measured / self.ideal


class Layer(pydantic.BaseModel, extra="forbid"):
    """One shape, dense against factored at the middle rank of the model's layers, in microseconds."""

    model: str
    out_features: int
    in_features: int
    layers: int
    rank: int
    tokens: int
    dense: float
    factored: float

    @property
    def ideal(self) -> float:
        """Return dense numbers over those of the gauge form."""
        m, n, r = self.out_features, self.in_features, self.rank
        return m * n / (r * (m + n - r))


class Roofs(pydantic.BaseModel, extra="forbid"):
    """What the machine can do at the most, as measured."""

    bytes_per_second: float  # weights read by a product with one vector
    flops: float  # of a large product, two for each multiplication


class Bench(pydantic.BaseModel, extra="forbid"):
    """A whole bench."""

    machine: Machine
    processor: str
    prompt: int
    new: int
    prefill: int
    batches: list[int]
    repeats: int
    optimized: bool
    rows: list[Row]
    ratios: list[Ratio]
    layers: list[Layer]
    roofs: Roofs
    notes: list[str] = []
