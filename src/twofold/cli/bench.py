"""twofold bench: how fast models are on this machine, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twofold.errors import TwofoldError


def command(
    models: Annotated[list[str], typer.Argument(help="Folders, exported ones too, hub ids, .gguf files, or smollm2.")],
    against: Annotated[str | None, typer.Option(help="The original model to compare with.")] = None,
    runtime: Annotated[str, typer.Option(help="Between commas: eager, compile, onnx, openvino.")] = "eager",
    batch: Annotated[str, typer.Option(help="Sequences that are written at once, between commas.")] = "1,8",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens before those that are written.")] = 32,
    new: Annotated[int, typer.Option(min=1, help="Tokens that are written.")] = 64,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the long prompt.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the figures are their medians.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch \\[default: its own choice].")] = None,
    optimize: Annotated[bool, typer.Option(help="Run factored models in their inference form.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each model in a process of its own.")] = True,
    dtype: Annotated[str, typer.Option(help="Of the computation; auto is float32 on a processor.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A new folder for the record and the figure.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Time models: tokens a second, prompts, memory, loading, and how near the speed-up comes to the ideal one."""
    import torch

    from twofold.cli.speed_tables import print_bench
    from twofold.host.folders import check_output
    from twofold.speed.bench import Lengths, bench
    from twofold.speed.output import write_bench
    from twofold.speed.runtimes.base import Settings

    if out is not None:
        check_output(out, overwrite=False)
    if threads is not None:
        torch.set_num_threads(threads)
    lengths = Lengths(prompt, new, prefill, _batches(batch), repeats)
    settings = Settings(dtype, device, optimize, trust_remote_code, quiet)
    runtimes = [name for name in runtime.split(",") if name]
    if not runtimes:
        raise TwofoldError("--runtime names none; give some between commas, as eager,compile")
    result = bench(models, against=against, runtimes=runtimes, lengths=lengths, settings=settings, memory=memory)
    if out is not None:
        write_bench(result, out)
    if json_output:
        print(result.model_dump_json(indent=1))
    else:
        print_bench(result, out)


def _batches(text: str) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise TwofoldError(f"--batch must be whole numbers above 0 between commas, as 1,8, got {text!r}")
    return found
