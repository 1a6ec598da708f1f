"""Rounds of a bench: models that are ready, their seconds in turn, and what follows from them."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from twofold.inference.timing import timed
from twofold.speed.memory import random_ids
from twofold.speed.record import Ratio, Row, Timing
from twofold.speed.runtimes import Runtime, Session, Settings


@dataclass(frozen=True)
class Lengths:
    """What is timed."""

    prompt: int = 32  # tokens before those that are written
    new: int = 64  # tokens that are written
    prefill: int = 512  # tokens of a long prompt
    batches: tuple[int, ...] = (1, 8)  # sequences written at once
    repeats: int = 5  # rounds


@dataclass
class Timed:
    """One model in one runtime while it is timed."""

    name: str
    place: str  # what is loaded: the model, or an export of it
    original: bool
    session: Session
    prepared: float  # seconds
    disk: int | None
    seconds: dict[str, list[float]]  # of each round, by what is timed


def opened(
    places: dict[str, str], against: str | None, runtime: Runtime, settings: Settings, repeats: int
) -> list[Timed]:
    """Load the models in turn some times, make those of the last round ready; the first round may read the disk, uncounted."""
    seconds: dict[str, list[float]] = {name: [] for name in places}
    held: dict[str, Any] = {}
    for number in range(repeats + 1):
        for name, place in places.items():
            gc.collect()
            start = time.perf_counter()
            held[name] = runtime.load(place, settings)
            if number:
                seconds[name].append(time.perf_counter() - start)
            if number < repeats:
                del held[name]
    models = []
    for name, place in places.items():
        loaded = held.pop(name)
        disk = runtime.disk_bytes(loaded)
        start = time.perf_counter()
        session = runtime.session(loaded, settings)
        prepared = time.perf_counter() - start
        models.append(Timed(name, place, name == against, session, prepared, disk, {"load": seconds[name]}))
    return models


def time_all(models: list[Timed], lengths: Lengths, device: torch.device, tick: Callable[[], None]) -> None:
    """Take all measurements, model after model in each round; the first round warms up and is not counted."""
    for number in range(lengths.repeats + 1):
        for model in models:
            for what, seconds in _round(model.session, lengths, device).items():
                if number:
                    model.seconds.setdefault(what, []).append(seconds)
            tick()


def _round(session: Session, lengths: Lengths, device: torch.device) -> dict[str, float]:
    """Take each measurement once, in seconds."""
    seconds: dict[str, float] = {}
    for batch in lengths.batches:
        state = session.begin(random_ids(session, batch, lengths.prompt), lengths.new)
        steps = [partial(session.step, state)] * lengths.new
        seconds[f"decode {batch}"] = timed(lambda steps=steps: [step() for step in steps], device)  # type: ignore[misc]
    for what, length in (("prefill", lengths.prefill), ("first token", lengths.prompt)):
        seconds[what] = timed(partial(session.begin, random_ids(session, 1, length), 1), device)
    return seconds


def row_of(model: Timed, runtime: str, lengths: Lengths, peak: int | None) -> Row:
    """Return the record of a model that was timed."""
    seconds = model.seconds
    return Row(
        model=model.name,
        runtime=runtime,
        original=model.original,
        dtype=model.session.dtype,
        decode={b: Timing(seconds=seconds[f"decode {b}"], tokens=b * lengths.new) for b in lengths.batches},
        prefill=Timing(seconds=seconds["prefill"], tokens=lengths.prefill),
        first_token=Timing(seconds=seconds["first token"], tokens=lengths.prompt),
        load=Timing(seconds=seconds["load"]),
        prepare=model.prepared,
        memory=model.session.weight_bytes,
        peak_memory=peak,
        disk=model.disk,
        work=model.session.work,
    )


def ratios_of(rows: list[Row], lengths: Lengths) -> list[Ratio]:
    """Compare each model with the original in the same runtime."""
    original = next((row for row in rows if row.original), None)
    whats = [*(f"decode {batch}" for batch in lengths.batches), "prefill", "first token", "load"]
    ratios = []
    for row, what in itertools.product(rows, whats):
        if original is not None and row is not original:
            pairs = zip(original.timing(what).seconds, row.timing(what).seconds, strict=True)
            measured = statistics.median(before / after for before, after in pairs)
            ideal = _ideal(original, row, what, lengths)
            ratios.append(Ratio(model=row.model, runtime=row.runtime, what=what, measured=measured, ideal=ideal))
    return ratios


def _ideal(original: Row, row: Row, what: str, lengths: Lengths) -> float | None:
    """Return the speed-up at best, by bytes moved for decode, multiplications for prompts, bytes on disk for loading."""
    if what == "load":
        return original.disk / row.disk if original.disk and row.disk else None
    if original.work is None or row.work is None:
        return None
    kind, _, batch = what.partition(" ")
    if kind == "decode":
        context = lengths.prompt + lengths.new / 2
        return original.work.decode_bytes(int(batch), context) / row.work.decode_bytes(int(batch), context)
    length = lengths.prefill if what == "prefill" else lengths.prompt
    return original.work.prefill_multiplications(length) / row.work.prefill_multiplications(length)
