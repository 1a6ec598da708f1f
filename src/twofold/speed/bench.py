"""Models timed side by side: the original and the factored ones in turn, in one process, in one runtime after another."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from twofold.errors import TwofoldError
from twofold.host.clock import machine, processor
from twofold.host.folders import check_output
from twofold.host.progress import progress
from twofold.inference.latency import DECODE, PREFILL, time_shape
from twofold.inference.timing import timed
from twofold.model.load import load_skeleton
from twofold.model.source import choose_device
from twofold.nn.layers.factored import FactoredLinear
from twofold.speed.memory import peak_of, random_ids
from twofold.speed.output import write_bench
from twofold.speed.record import Bench, Layer, Ratio, Row, Timing
from twofold.speed.roofs import measure_roofs
from twofold.speed.runtimes import RUNTIMES, Runtime, Session, Settings, get_runtime


@dataclass(frozen=True)
class Lengths:
    """What is timed."""

    prompt: int = 32  # tokens before those that are written
    new: int = 64  # tokens that are written
    prefill: int = 512  # tokens of a long prompt
    batches: tuple[int, ...] = (1, 8)  # sequences written at once
    repeats: int = 5  # rounds


@dataclass
class _Timed:
    """One model in one runtime while it is timed."""

    name: str
    place: str  # what is loaded: the model, or an export of it
    original: bool
    session: Session
    loaded: list[float]
    prepared: float
    disk: int | None
    seconds: dict[str, list[float]] = field(default_factory=dict)


def bench(
    models: str | Sequence[str],
    *,
    against: str | None = None,
    runtime: str | Sequence[str] = "eager",
    batch: int | str | Sequence[int] = (1, 8),
    prompt: int = 32,
    new: int = 64,
    prefill: int = 512,
    repeats: int = 5,
    threads: int | None = None,
    optimize: bool = True,
    memory: bool = True,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    out: Path | str | None = None,
    quiet: bool = False,
) -> Bench:
    """Time models, and the original beside them.

    Args:
        against: the original, which each of the others is compared with in the same runtime.
        runtime: names of runtimes, as a list or with commas between.
        batch: sequences that are written at once, one or several.
        prompt: tokens before those that are written.
        new: tokens that are written.
        prefill: tokens of the long prompt.
        repeats: rounds; the figures are their medians.
        threads: of PyTorch; by default its own choice.
        optimize: run factored models in their inference form.
        memory: whether peak memory is measured, each model once more in a process of its own.
        out: a new folder for the record and the figure.

    Raises:
        TwofoldError: for a runtime that is not installed, a folder that none of them runs, or a prompt beyond the context.
    """
    if out is not None:
        check_output(Path(out), overwrite=False)
    if threads is not None:
        torch.set_num_threads(threads)
    lengths = Lengths(prompt, new, prefill, _batches(batch), repeats)
    settings = Settings(dtype, device, optimize, trust_remote_code, quiet)
    chosen = [get_runtime(name) for name in dict.fromkeys(_names(runtime))]
    if not chosen:
        raise TwofoldError("`runtime` names none; give some with commas between, as `runtime=eager,compile`")
    models = [models] if isinstance(models, str) else models
    bench = _bench(models, against, chosen, lengths, settings, memory=memory)
    if out is not None:
        write_bench(bench, Path(out))
    return bench


def _names(several: str | Sequence[str]) -> list[str]:
    return [name for name in (several.split(",") if isinstance(several, str) else several) if name]


def _batches(batch: int | str | Sequence[int]) -> tuple[int, ...]:
    try:
        parts = [batch] if isinstance(batch, int) else batch.split(",") if isinstance(batch, str) else batch
        batches = tuple(dict.fromkeys(int(part) for part in parts))
    except ValueError:
        batches = ()
    if not batches or min(batches) < 1:
        raise TwofoldError(f"`batch` must be whole numbers above 0 with commas between, as 1,8, got {batch!r}")
    return batches


def _bench(
    models: Sequence[str],
    against: str | None,
    chosen: list[Runtime],
    lengths: Lengths,
    settings: Settings,
    *,
    memory: bool,
) -> Bench:
    """Time models in the runtimes."""
    names = list(dict.fromkeys([*([against] if against is not None else []), *models]))
    notes, able = _able(names, chosen, settings)
    for runtime in chosen:
        runtime.check(able[runtime.name], settings)
        for name in able[runtime.name]:
            _check_lengths(name, runtime.context(name, settings), lengths)
    with tempfile.TemporaryDirectory(prefix="twofold-bench-") as folder:
        places = {runtime.name: _places(runtime, able, settings, Path(folder)) for runtime in chosen}
        rows, ratios, more = _rows(places, against, chosen, lengths, settings, memory)
    device, dtype = choose_device(settings.device), getattr(torch, rows[0].dtype, torch.float32)
    return Bench(
        machine=machine(device, dtype),
        processor=processor(device),
        prompt=lengths.prompt,
        new=lengths.new,
        prefill=lengths.prefill,
        batches=list(lengths.batches),
        repeats=lengths.repeats,
        optimized=settings.optimize,
        rows=rows,
        ratios=ratios,
        layers=[layer for name in names for layer in layer_table(name, settings, dtype, device)],
        roofs=measure_roofs(dtype, device, lengths.repeats),
        notes=list(dict.fromkeys([*notes, *more])),
    )


def _places(runtime: Runtime, able: dict[str, list[str]], settings: Settings, folder: Path) -> dict[str, str]:
    """What the runtime loads for each of its models, in a folder of its own if it has to make it."""
    own = folder / runtime.name
    own.mkdir()
    return runtime.places(able[runtime.name], settings, own)


def _rows(
    places: dict[str, dict[str, str]],  # by runtime and model
    against: str | None,
    chosen: list[Runtime],
    lengths: Lengths,
    settings: Settings,
    memory: bool,
) -> tuple[list[Row], list[Ratio], list[str]]:
    """Every model in every runtime, the ratios, and notes."""
    device = choose_device(settings.device)
    notes: list[str] = []
    rows: list[Row] = []
    ratios: list[Ratio] = []
    rounds = sum(len(models) for models in places.values()) * (lengths.repeats + 1)
    with progress("Timing", rounds, unit="rounds", quiet=settings.quiet) as tick:
        for runtime in chosen:
            timed_here = _opened(places[runtime.name], against, runtime, settings, lengths.repeats)
            for one in timed_here:
                _check_lengths(one.name, one.session.positions, lengths)
                notes += one.session.notes
                if one.place != one.name:
                    notes.append(
                        f"{one.name} in {runtime.name} is an export that was made for this bench: its layers are as they are "
                        "stored, not in their inference form, and the export is no part of the time to load"
                    )
            _time(timed_here, lengths, device, tick)
            peaks = {
                one.name: peak_of(
                    one.place, runtime.name, settings, lengths.prompt, lengths.new, lengths.prefill, one.name
                )
                for one in timed_here
                if memory
            }
            made = [_row(one, runtime.name, lengths, peaks.get(one.name)) for one in timed_here]
            rows += made
            ratios += _ratios(made, lengths)
            del timed_here
            gc.collect()
    return rows, ratios, notes


def _able(names: list[str], chosen: list[Runtime], settings: Settings) -> tuple[list[str], dict[str, list[str]]]:
    """Which models each runtime runs, and notes on those that it does not.

    Raises:
        TwofoldError: if a model is run by none of them.
    """
    notes: list[str] = []
    able: dict[str, list[str]] = {runtime.name: [] for runtime in chosen}
    for name in names:
        reasons = {runtime.name: runtime.why_not(name, settings) for runtime in chosen}
        for runtime, reason in reasons.items():
            if reason is None:
                able[runtime].append(name)
            else:
                notes.append(f"{name} is not timed in {runtime}: {reason}")
        if all(reason is not None for reason in reasons.values()):
            why = "; ".join(f"{runtime}: {reason}" for runtime, reason in reasons.items())
            raise TwofoldError(
                f"{name} is run by none of the runtimes that are named ({why}); name one for it with `runtime`"
            )
    return notes, able


def _opened(
    places: dict[str, str], against: str | None, runtime: Runtime, settings: Settings, repeats: int
) -> list[_Timed]:
    """Load the models in turn some times, make those of the last round ready; the first round may read the disk, uncounted."""
    seconds: dict[str, list[float]] = {name: [] for name in places}
    held: dict[str, Any] = {}
    for number in range(repeats + 1):
        for name, place in places.items():
            held.pop(name, None)
            gc.collect()
            start = time.perf_counter()
            held[name] = runtime.load(place, settings)
            if number:
                seconds[name].append(time.perf_counter() - start)
            if number < repeats:
                del held[name]
    made = []
    for name, place in places.items():
        loaded = held.pop(name)
        disk = runtime.disk_bytes(loaded)
        start = time.perf_counter()
        session = runtime.session(loaded, settings)
        prepared = time.perf_counter() - start
        made.append(_Timed(name, place, name == against, session, seconds[name], prepared, disk))
    return made


def _check_lengths(name: str, most: int | None, lengths: Lengths) -> None:
    """Refuse what is longer than the model's context.

    Raises:
        TwofoldError: with how many tokens it has.
    """
    if most is None:
        return
    if lengths.prompt + lengths.new > most:
        raise TwofoldError(
            f"`prompt={lengths.prompt}` and `new={lengths.new}` are longer than the context of {name}, {most} tokens; "
            "give fewer"
        )
    if lengths.prefill + 1 > most:
        raise TwofoldError(
            f"`prefill={lengths.prefill}` and the token behind it are longer than the context of {name}, {most} tokens; "
            f"use `prefill={most - 1}`"
        )


def _time(models: list[_Timed], lengths: Lengths, device: torch.device, tick: Callable[[], None]) -> None:
    """All measurements, model after model in each round; the first round warms up and is not counted."""
    for number in range(lengths.repeats + 1):
        for one in models:
            for what, seconds in _round(one.session, lengths, device).items():
                if number:
                    one.seconds.setdefault(what, []).append(seconds)
            tick()


def _round(session: Session, lengths: Lengths, device: torch.device) -> dict[str, float]:
    """Seconds of each measurement, once."""
    found: dict[str, float] = {}
    for batch in lengths.batches:
        state = session.begin(random_ids(session, batch, lengths.prompt), lengths.new)

        def write(state: Any = state) -> None:
            for _ in range(lengths.new):
                session.step(state)

        found[f"decode {batch}"] = timed(write, device)
    for what, length in (("prefill", lengths.prefill), ("first token", lengths.prompt)):
        ids = random_ids(session, 1, length)
        found[what] = timed(lambda ids=ids: session.begin(ids, 1), device)  # type: ignore[misc]
    return found


def _row(one: _Timed, runtime: str, lengths: Lengths, peak: int | None) -> Row:
    seconds = one.seconds
    return Row(
        model=one.name,
        runtime=runtime,
        original=one.original,
        dtype=one.session.dtype,
        decode={b: Timing(seconds=seconds[f"decode {b}"], tokens=b * lengths.new) for b in lengths.batches},
        prefill=Timing(seconds=seconds["prefill"], tokens=lengths.prefill),
        first_token=Timing(seconds=seconds["first token"], tokens=lengths.prompt),
        load=Timing(seconds=one.loaded),
        prepare=one.prepared,
        memory=one.session.weight_bytes,
        peak_memory=peak,
        disk=one.disk,
        work=one.session.work,
    )


def _ratios(rows: list[Row], lengths: Lengths) -> list[Ratio]:
    """Each model against the original in the same runtime."""
    original = next((row for row in rows if row.original), None)
    if original is None:
        return []
    found = []
    whats = [*(f"decode {batch}" for batch in lengths.batches), "prefill", "first token", "load"]
    for row in rows:
        if row is original:
            continue
        for what in whats:
            pairs = zip(original.timing(what).seconds, row.timing(what).seconds, strict=True)
            measured = statistics.median(one / other for one, other in pairs)
            ideal = _ideal(original, row, what, lengths)
            found.append(Ratio(model=row.model, runtime=row.runtime, what=what, measured=measured, ideal=ideal))
    return found


def _ideal(original: Row, row: Row, what: str, lengths: Lengths) -> float | None:
    """How many times as fast it could be: by bytes moved for decode, multiplications for prompts, bytes on disk for loading."""
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


def layer_table(name: str, settings: Settings, dtype: torch.dtype, device: torch.device) -> list[Layer]:
    """Each shape of a factored model's layers at their middle rank, dense against factored, for one token and for many."""
    if name.endswith(".gguf") or RUNTIMES.get("eager").why_not(name, settings) is not None:
        return []
    model = load_skeleton(name, trust_remote_code=settings.trust_remote_code).model
    shapes: dict[tuple[int, int], list[int]] = {}
    for module in model.modules():
        if type(module) is FactoredLinear and module.bits is None:
            shapes.setdefault((module.out_features, module.in_features), []).append(module.rank)
    rows = []
    for (m, n), ranks in shapes.items():
        rank = int(statistics.median_low(ranks))
        for tokens in (DECODE, PREFILL):
            times = time_shape(m, n, [rank], tokens, dtype=dtype, device=device)
            rows.append(
                Layer(
                    model=name,
                    out_features=m,
                    in_features=n,
                    layers=len(ranks),
                    rank=rank,
                    tokens=tokens,
                    dense=times.dense,
                    factored=times.factored[0],
                )
            )
    return rows
