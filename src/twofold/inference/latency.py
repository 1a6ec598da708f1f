"""Measured microseconds of a shape on this machine, dense and factored at every rank: a small table in the cache.

Each shape (m, n) is measured at some ranks, in turn with the dense product, and interpolated between them. For one token the
weights are read from memory, as a model reads them, and not from the cache of the processor: several copies take turns. The
factored layer is that of the inference form, ordered outputs included; what it gains where it shares a product is not counted.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.host.cache import cache_folder
from twofold.host.clock import processor
from twofold.host.files import write_text
from twofold.host.progress import progress
from twofold.inference.timing import in_turn
from twofold.linalg.gauge import gauge_rank
from twofold.model.target import Target
from twofold.nn.grouped_linear import ColumnsLinear, InputGroup, Part, fixed, laid_out

FORMAT = 1
KEEPS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)  # shares of the dense numbers at which ranks are measured
COPIES = 160 * 2**20  # bytes of all copies of one weight: more than the cache of a processor holds
MANY = 400  # copies at the most: small weights stay in the cache of the processor, as a small model's do
DECODE, PREFILL = 1, 512  # tokens
MARGIN = 1.02  # what is slower by less is not told from noise
REPEATS = {DECODE: 7, PREFILL: 5}
TALL = (2048, 512)  # the shape whose two layouts are compared

# gauge has its pivots among the outputs, which are put in order; unordered leaves them as they are computed; columns has them
# among the inputs.
StoredForm = Literal["gauge", "plain", "unordered", "columns"]


class Times(pydantic.BaseModel, extra="forbid", allow_inf_nan=False):
    """One shape, for one number of tokens: microseconds."""

    dense: pydantic.PositiveFloat
    ranks: list[pydantic.PositiveInt]  # ascending
    factored: list[pydantic.PositiveFloat]  # at these ranks


class Table(pydantic.BaseModel, extra="forbid"):
    """What was measured on one machine with one dtype, number of threads and version of PyTorch."""

    about: dict[str, str]
    by_columns: bool | None = None  # whether a tall weight is read faster by columns
    shapes: dict[str, Times] = {}  # "gauge 576x1536 1 token"


@dataclass
class Latencies:
    """The table of this machine, measured as it is asked for.

    Args:
        path: of its file; None keeps it in memory alone.
        take: measures a shape; the clock of this machine by default.
    """

    table: Table
    dtype: torch.dtype
    device: torch.device
    path: Path | None = None
    quiet: bool = False
    take: Callable[[int, int, StoredForm, int], Times] | None = field(default=None, repr=False)

    @classmethod
    def of_this_machine(
        cls, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, quiet: bool = False
    ) -> Latencies:
        """Return the table in the cache, or an empty one; one that can't be read is measured again."""
        device = torch.device(device)
        about = {
            "format": str(FORMAT),
            "machine": processor(device),
            "threads": str(torch.get_num_threads()),
            "dtype": str(dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        path = cache_folder() / "latency" / f"{name}.json"
        table = Table(about=about)
        with suppress(OSError, ValueError):
            cached = Table.model_validate_json(path.read_text(encoding="utf-8"))
            table = cached if cached.about == about else table
        return cls(table, dtype, device, path, quiet)

    @property
    def words(self) -> str:
        """Say what the times hold for."""
        about = self.table.about
        return f"{about['machine']}, {about['threads']} threads, {about['dtype']}, torch {about['torch']}"

    @property
    def by_columns(self) -> bool:
        """Tell whether weights with more rows than columns are read faster when they are kept by columns."""
        if self.table.by_columns is None:
            self.table.by_columns = columns_pay(self.dtype, self.device)
            self._save()
        return self.table.by_columns

    def measure(
        self, shapes: Iterable[tuple[int, int]], form: StoredForm = "gauge", tokens: Iterable[int] = (DECODE, PREFILL)
    ) -> None:
        """Measure what the table lacks of some shapes (m, n)."""
        wanted = {_key(form, m, n, t): (m, n, form, t) for m, n in shapes for t in tokens}
        missing = {key: shape for key, shape in wanted.items() if key not in self.table.shapes}
        if not missing:
            return
        with progress("Measuring layers", len(missing), unit="shapes", quiet=self.quiet) as tick:
            for key, shape in missing.items():
                self.table.shapes[key] = (self.take or self._times)(*shape)
                self._save()
                tick()

    def dense(self, m: int, n: int, tokens: int = DECODE, form: StoredForm = "gauge") -> float:
        """Return the microseconds of the dense product."""
        return self._stored(form, m, n, tokens).dense

    def factored(
        self, m: int, n: int, ranks: ArrayLike, tokens: int = DECODE, form: StoredForm = "gauge"
    ) -> NDArray[np.float64]:
        """Return the microseconds at some ranks, interpolated, and never less than at a smaller rank."""
        times = self._stored(form, m, n, tokens)
        return np.asarray(
            np.interp(np.asarray(ranks, dtype=np.float64), times.ranks, np.maximum.accumulate(times.factored))
        )

    def slower(
        self, m: int, n: int, rank: int, form: StoredForm = "gauge", counts: Iterable[int] = (DECODE, PREFILL)
    ) -> str | None:
        """Say the measured times if a factored layer is slower than a dense one, for one of some counts of tokens; else None."""
        for tokens in counts:
            words = "one token" if tokens == DECODE else f"{tokens} tokens"
            factored, dense = float(self.factored(m, n, [rank], tokens, form)[0]), self.dense(m, n, tokens, form)
            if factored > MARGIN * dense:
                return f"measured {factored:.0f} µs at rank {rank} against {dense:.0f} µs dense, {words}"
        return None

    def _stored(self, form: StoredForm, m: int, n: int, tokens: int) -> Times:
        self.measure([(m, n)], form, [tokens])
        return self.table.shapes[_key(form, m, n, tokens)]

    def _save(self) -> None:
        if self.path is not None:
            with suppress(TwofoldError):  # a cache that can't be written costs the next run its time, and nothing else
                write_text(self.path, self.table.model_dump_json(indent=1) + "\n")

    def _times(self, m: int, n: int, form: StoredForm, tokens: int) -> Times:
        ranks, by = measured_ranks(m, n, form), self.by_columns
        return time_shape(m, n, ranks, tokens, form, dtype=self.dtype, device=self.device, by_columns=by)


def times_of(
    targets: Iterable[Target],
    form: StoredForm,
    dtype: torch.dtype,
    device: torch.device,
    *,
    latencies: Latencies | None = None,
    quiet: bool = False,
) -> tuple[dict[str, LayerTimes], str]:
    """Return the times of some weights for one token, and what they hold for, in words."""
    table = latencies or Latencies.of_this_machine(dtype, device, quiet=quiet)
    shapes = {target.name: (target.out_features, target.in_features) for target in targets}
    table.measure(shapes.values(), form, [DECODE])
    times = {}
    for name, (m, n) in shapes.items():
        ranks = measured_ranks(m, n, form)
        factored = table.factored(m, n, ranks, DECODE, form)
        times[name] = LayerTimes(table.dense(m, n, DECODE, form), tuple(ranks), tuple(factored.tolist()))
    return times, table.words


def time_shape(
    m: int,
    n: int,
    ranks: list[int],
    tokens: int,
    form: StoredForm = "gauge",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    by_columns: bool | None = None,
) -> Times:
    """Measure one shape: the dense product and a factored layer in turn, at one rank after another.

    Args:
        by_columns: whether tall weights are kept by columns; measured if it is None.
    """
    columns = columns_pay(dtype, device) if by_columns is None else by_columns
    base = torch.rand(m, n, device=device, dtype=torch.float32).sub_(0.5).to(dtype)
    count = _copies(base) if tokens == DECODE else 1
    x = torch.rand(1, tokens, n, device=device, dtype=torch.float32).to(dtype)
    dense = [_linear(base) for _ in range(count)]
    times = []
    for rank in ranks:
        factored = [_layer(base, rank, form, columns) for _ in range(count)]
        times.append(_medians(x, [dense, factored], REPEATS.get(tokens, 3)))
    typical = float(np.median([reference for reference, _ in times])) / count * 1e6
    return Times(dense=typical, ranks=ranks, factored=[time / reference * typical for reference, time in times])


def columns_pay(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Tell whether a weight with more rows than columns is multiplied with one vector faster when it is kept by columns."""
    base = torch.rand(*TALL, device=device, dtype=torch.float32).to(dtype)
    x = torch.rand(1, TALL[1], device=device, dtype=torch.float32).to(dtype)
    layouts = [[laid_out(base, by).clone().T for _ in range(_copies(base))] for by in (False, True)]
    by_rows, by_columns = _medians(
        x, [[partial(torch.mm, mat2=w) for w in weights] for weights in layouts], REPEATS[DECODE]
    )
    return by_columns < 0.95 * by_rows


def _medians(x: Tensor, products: Sequence[Sequence[Callable[[Tensor], object]]], repeats: int) -> list[float]:
    """Return the median seconds of some products with x, each done one copy after another, in turn."""

    def run(copies: Sequence[Callable[[Tensor], object]]) -> None:
        for product in copies:
            product(x)

    with torch.inference_mode():
        rounds = in_turn([partial(run, copies) for copies in products], repeats, x.device)
    return [statistics.median(seconds) for seconds in rounds]


def _copies(weight: Tensor) -> int:
    """Return how many copies of a weight are more than a processor's cache holds, unless it is very small."""
    return min(max(2, COPIES // weight.nbytes), MANY)


def measured_ranks(m: int, n: int, form: StoredForm) -> list[int]:
    """Return the ranks that a shape is measured at, ascending: 1, and those of ``KEEPS``."""
    gauge = form != "plain"
    largest = max(min(m, n) - (gauge and m <= n), 1)
    ranks = (gauge_rank(m, n, keep * m * n) if gauge else int(keep * m * n / (m + n)) for keep in KEEPS)
    return sorted({min(max(rank, 1), largest) for rank in ranks})


def _layer(base: Tensor, rank: int, form: StoredForm, columns: bool) -> nn.Module:
    (m, n), gauge = base.shape, form != "plain"
    if form == "columns":
        rest = base.reshape(-1)[: rank * (n - rank)].reshape(rank, n - rank).clone()
        return ColumnsLinear(rest, base[:, :rank].clone(), torch.randperm(n, device=base.device), None, columns)
    outer = m - rank if gauge else m
    expand = base.T.reshape(-1)[: outer * rank].reshape(outer, rank).clone()
    order = torch.randperm(m, device=base.device) if form == "gauge" else None
    return InputGroup([Part(base[:rank].clone(), expand, gauge, order)], columns)


def _linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = fixed(weight.clone())
    return layer


def _key(form: StoredForm, m: int, n: int, tokens: int) -> str:
    return f"{form} {m}x{n} {tokens} {'token' if tokens == 1 else 'tokens'}"


@dataclass(frozen=True)
class LayerTimes:
    """Measured microseconds of one weight for one token: dense, and factored at some ranks between which it is interpolated."""

    dense: float
    ranks: tuple[int, ...]  # ascending
    factored: tuple[float, ...]  # never falling

    def at(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the microseconds at some ranks."""
        return np.interp(ranks, self.ranks, self.factored)
