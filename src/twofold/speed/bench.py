"""Models timed side by side: the original and the factored ones in turn, in one process, in one runtime after another."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from twofold.errors import TwofoldError
from twofold.host.clock import machine, processor
from twofold.host.folders import check_output
from twofold.host.progress import progress
from twofold.model.source import choose_device
from twofold.speed.layers import layer_table
from twofold.speed.memory import peak_of
from twofold.speed.output import write_bench
from twofold.speed.record import Bench, Ratio, Row
from twofold.speed.roofs import measure_roofs
from twofold.speed.rounds import Lengths, opened, ratios_of, row_of, time_all
from twofold.speed.runtimes import Runtime, Settings, get_runtime


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
            timed_here = opened(places[runtime.name], against, runtime, settings, lengths.repeats)
            for one in timed_here:
                _check_lengths(one.name, one.session.positions, lengths)
                notes += one.session.notes
                if one.place != one.name:
                    notes.append(
                        f"{one.name} in {runtime.name} is an export that was made for this bench: its layers are as they are "
                        "stored, not in their inference form, and the export is no part of the time to load"
                    )
            time_all(timed_here, lengths, device, tick)
            peaks = {
                one.name: peak_of(
                    one.place, runtime.name, settings, lengths.prompt, lengths.new, lengths.prefill, one.name
                )
                for one in timed_here
                if memory
            }
            made = [row_of(one, runtime.name, lengths, peaks.get(one.name)) for one in timed_here]
            rows += made
            ratios += ratios_of(made, lengths)
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
