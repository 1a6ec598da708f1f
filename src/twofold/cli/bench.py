"""twofold bench: how fast models are on this machine, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import twofold
from twofold.cli.flags import Against, Device, Dtype, Json, Quiet, Trust
from twofold.cli.tables import answer, console, megabytes, print_notes, print_place, table

if TYPE_CHECKING:
    from twofold.speed.record import Bench, Ratio, Row


def command(
    models: Annotated[list[str], typer.Argument(help="Folders, exported ones too, hub ids, .gguf files, or smollm2.")],
    against: Against = None,
    runtime: Annotated[str, typer.Option(help="Between commas: eager, compile, onnx, openvino.")] = "eager",
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
    settings: dict[str, Any] = {**locals()}
    del settings["json_output"]
    bench = twofold.bench(**settings)
    answer(bench, json_output, lambda: print_bench(bench, out))


def print_bench(bench: Bench, out: Path | None) -> None:
    """Every model in every runtime, the speed-ups beside the ideal ones, and the layers by shape."""
    machine = bench.machine
    table(
        f"{bench.processor}, {machine.threads} threads, {machine.dtype}, torch {machine.torch}: medians of {bench.repeats}",
        [
            "model",
            "runtime",
            *(f"decode {batch}, tokens/s" for batch in bench.batches),
            f"prefill {bench.prefill}, tokens/s",
            "first token",
            "load",
            "weights",
            "peak memory",
            "disk",
        ],
        (_row(bench, row) for row in bench.rows),
        left=2,
    )
    if bench.ratios:
        table(
            "Times as fast as the original in the same runtime",
            ["model", "runtime", "what", "measured", "ideal", "share of the ideal"],
            ([r.model, r.runtime, r.what, f"{r.measured:.2f} ×", *_ideal(r)] for r in bench.ratios),
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
                    str(layer.layers),
                    str(layer.rank),
                    str(layer.tokens),
                    f"{layer.dense:,.0f} µs",
                    f"{layer.factored:,.0f} µs",
                    f"{layer.dense / layer.factored:.2f}",
                    f"{layer.ideal:.2f}",
                ]
                for layer in bench.layers
            ),
            left=2,
        )
    console.print(
        f"decode: {bench.new} tokens behind {bench.prompt}; ideal: bytes moved for decode, multiplications for prompts, bytes on "
        "disk for loading.",
        soft_wrap=True,
    )
    print_notes(bench.notes)
    if out is not None:
        print_place("Record and roofline", out)


def _row(bench: Bench, row: Row) -> list[str]:
    return [
        row.model,
        row.runtime,
        *(f"{row.decode[batch].rate:,.1f}" for batch in bench.batches),
        f"{row.prefill.rate:,.0f}",
        f"{1e3 * row.first_token.median:,.1f} ms",
        f"{row.load.median:.2f} s",
        megabytes(row.memory),
        megabytes(row.peak_memory),
        megabytes(row.disk),
    ]


def _ideal(ratio: Ratio) -> list[str]:
    if ratio.ideal is None or ratio.share is None:
        return ["–", "–"]
    return [f"{ratio.ideal:.2f} ×", f"{ratio.share:.0%}"]
