"""twofold bench: how fast models are on this machine, side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import twofold
from twofold.cli.flags import Against, Device, Dtype, Json, Quiet, Trust
from twofold.cli.tables import megabytes, number, print_notes, print_place, run_command, table, tell
from twofold.speed.runtimes import RUNTIMES

if TYPE_CHECKING:
    from twofold.speed.record import Bench


def command(
    models: Annotated[list[str], typer.Argument(help="Folders, exported ones too, hub ids, .gguf files, or smollm2.")],
    against: Against = None,
    runtime: Annotated[str, typer.Option(help=f"Between commas: {', '.join(RUNTIMES.names())}.")] = "eager",
    batch: Annotated[str, typer.Option(help="Sequences that are written at once, between commas.")] = "1,8",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens before those that are written.")] = 32,
    new: Annotated[int, typer.Option(min=1, help="Tokens that are written.")] = 64,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the long prompt.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the figures are their medians.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch \\[default: its own choice].")] = None,
    optimize: Annotated[bool, typer.Option(help="Run factored models in their inference form.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each model in a process of its own.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A new folder for the record and the figure.")] = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time models: tokens a second, prompts, memory, loading, and how near the speed-up comes to the ideal one."""
    run_command(twofold.bench, {**locals()}, partial(print_bench, out=out))


def print_bench(bench: Bench, out: Path | None) -> None:
    """Print every model in every runtime, the speed-ups beside the ideal ones, and the layers by shape."""
    machine = bench.machine
    decode = [f"decode {batch}, tokens/s" for batch in bench.batches]
    prefill = f"prefill {bench.prefill}, tokens/s"
    table(
        f"{bench.processor}, {machine.threads} threads, {machine.dtype}, torch {machine.torch}: medians of {bench.repeats}",
        ["model", "runtime", *decode, prefill, "first token", "load", "weights", "peak memory", "disk"],
        (
            [
                row.model,
                row.runtime,
                *(f"{row.decode[batch].rate:,.1f}" for batch in bench.batches),
                f"{row.prefill.rate:,.0f}",
                f"{1e3 * row.first_token.median:,.1f} ms",
                f"{row.load.median:.2f} s",
                *(megabytes(size) for size in (row.memory, row.peak_memory, row.disk)),
            ]
            for row in bench.rows
        ),
        left=2,
    )
    if bench.ratios:
        table(
            "Times as fast as the original in the same runtime",
            ["model", "runtime", "what", "measured", "ideal", "share of the ideal"],
            ([r.model, r.runtime, r.what, *_times(r.measured, r.ideal), number(r.share, ".0%")] for r in bench.ratios),
            left=3,
        )
    if bench.layers:
        table(
            "Layers, dense against factored (inference form, one alone)",
            ["model", "shape", "layers", "middle rank", "tokens", "dense", "factored", "×", "ideal"],
            (
                [
                    layer.model,
                    f"{layer.out_features} × {layer.in_features}",
                    layer.layers,
                    layer.rank,
                    layer.tokens,
                    *(f"{time:,.0f} µs" for time in (layer.dense, layer.factored)),
                    f"{layer.dense / layer.factored:.2f}",
                    f"{layer.ideal:.2f}",
                ]
                for layer in bench.layers
            ),
            left=2,
        )
    tell(
        f"decode: {bench.new} tokens behind {bench.prompt}; ideal: bytes moved for decode, multiplications for prompts, bytes on "
        "disk for loading.",
        wrap=False,
    )
    print_notes(bench.notes)
    if out is not None:
        print_place("Record and roofline", out)


def _times(*ratios: float | None) -> list[str]:
    return [number(ratio, ".2f", " ×") for ratio in ratios]
