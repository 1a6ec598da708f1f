"""The tables of a bench."""

from __future__ import annotations

from pathlib import Path

from twofold.cli.tables import console, megabytes, plain, table
from twofold.speed.record import Bench, Ratio, Row


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
    for note in bench.notes:
        console.print(f"Note: {plain(note)}.", soft_wrap=True)
    if out is not None:
        console.print(f"Record and roofline: {plain(str(out))}", highlight=False, soft_wrap=True)


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
