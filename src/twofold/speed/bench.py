"""Models timed side by side: the original and the factored ones in turn, in one process, in one runtime after another."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from twofold.errors import TwofoldError
from twofold.host.clock import machine, processor
from twofold.host.faults import decorating
from twofold.host.folders import check_output, staged_folder
from twofold.host.progress import progress
from twofold.model.source import choose_device
from twofold.speed.figure import draw_roofline
from twofold.speed.layers import layer_table
from twofold.speed.memory import peak_of
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
    asked = runtime.split(",") if isinstance(runtime, str) else runtime
    runtimes = [get_runtime(name) for name in dict.fromkeys(asked) if name]
    if not runtimes:
        raise TwofoldError("`runtime` names none; give some with commas between, as `runtime=eager,compile`")
    names = [*([against] if against is not None else []), *([models] if isinstance(models, str) else models)]
    record = _bench(list(dict.fromkeys(names)), against, runtimes, lengths, settings, memory)
    if out is not None:
        with staged_folder(Path(out)) as folder:
            with decorating("figure", record.notes):
                draw_roofline(record, [folder / "roofline.png", folder / "roofline.svg"])
            (folder / "bench.json").write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return record


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
    names: list[str], against: str | None, runtimes: list[Runtime], lengths: Lengths, settings: Settings, memory: bool
) -> Bench:
    """Time models in the runtimes."""
    notes, able = _able(names, runtimes, settings)
    for runtime in runtimes:
        runtime.check(able[runtime.name], settings)
        for name in able[runtime.name]:
            _check_lengths(name, runtime.context(name, settings), lengths)
    rows: list[Row] = []
    ratios: list[Ratio] = []
    with tempfile.TemporaryDirectory(prefix="twofold-bench-") as folder:
        places: dict[str, dict[str, str]] = {}  # what is loaded, by runtime and model
        for runtime in runtimes:
            own = Path(folder) / runtime.name
            own.mkdir()
            places[runtime.name] = runtime.places(able[runtime.name], settings, own)
        rounds = sum(map(len, places.values())) * (lengths.repeats + 1)
        with progress("Timing", rounds, unit="rounds", quiet=settings.quiet) as tick:
            for runtime in runtimes:
                timed = _time(runtime, places[runtime.name], against, lengths, settings, memory, notes, tick)
                rows += timed
                ratios += ratios_of(timed, lengths)
                gc.collect()
    device, dtype = choose_device(settings.device), getattr(torch, rows[0].dtype, torch.float32)
    return Bench(
        machine=machine(device, dtype),
        processor=processor(device),
        **asdict(lengths),
        optimized=settings.optimize,
        rows=rows,
        ratios=ratios,
        layers=[layer for name in names for layer in layer_table(name, settings, dtype, device)],
        roofs=measure_roofs(dtype, device, lengths.repeats),
        notes=list(dict.fromkeys(notes)),
    )


def _time(
    runtime: Runtime,
    places: dict[str, str],
    against: str | None,
    lengths: Lengths,
    settings: Settings,
    memory: bool,
    notes: list[str],  # to which those on the models are added
    tick: Callable[[], None],
) -> list[Row]:
    """Time the models of one runtime."""
    models = opened(places, against, runtime, settings, lengths.repeats)
    for model in models:
        _check_lengths(model.name, model.session.positions, lengths)
        notes += model.session.notes
        if model.place != model.name:
            notes.append(
                f"{model.name} in {runtime.name} is an export that was made for this bench: its layers are as they are "
                "stored, not in their inference form, and the export is no part of the time to load"
            )
    time_all(models, lengths, choose_device(settings.device), tick)
    most = (lengths.prompt, lengths.new, lengths.prefill)
    peaks = [peak_of(model.place, runtime.name, settings, *most, model.name) if memory else None for model in models]
    return [row_of(model, runtime.name, lengths, peak) for model, peak in zip(models, peaks, strict=True)]


def _able(names: list[str], runtimes: list[Runtime], settings: Settings) -> tuple[list[str], dict[str, list[str]]]:
    """Find which models each runtime runs, and make notes on those that it does not.

    Raises:
        TwofoldError: if a model is run by none of them.
    """
    notes: list[str] = []
    able: dict[str, list[str]] = {runtime.name: [] for runtime in runtimes}
    for name in names:
        answers = {runtime.name: runtime.why_not(name, settings) for runtime in runtimes}
        reasons = {runtime: reason for runtime, reason in answers.items() if reason is not None}
        if len(reasons) == len(runtimes):
            why = "; ".join(f"{runtime}: {reason}" for runtime, reason in reasons.items())
            raise TwofoldError(
                f"{name} is run by none of the runtimes that are named ({why}); name one for it with `runtime`"
            )
        notes += [f"{name} is not timed in {runtime}: {reason}" for runtime, reason in reasons.items()]
        for runtime in answers.keys() - reasons.keys():
            able[runtime].append(name)
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
