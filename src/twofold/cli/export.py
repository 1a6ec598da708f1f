"""twofold export: a model in the form that another program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="The folder of a factored checkpoint; some formats take any model.")],
    to: Annotated[str, typer.Option(help="dense, portable, lora, onnx, openvino, or gguf.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Of a LoRA adapter; by default what is exact.")] = None,
    base: Annotated[str | None, typer.Option(help="The original, for lora; its .gguf file, for gguf.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto is the stored one, float32 for runtimes.")] = "auto",
    check_tokens: Annotated[int, typer.Option(min=0, help="Tokens to decode in both, for the comparison.")] = 64,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that Twofold wrote.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Write a model for another program, and compare what that program will compute with the model."""
    from twofold.exports.carry_out import export_model

    result = export_model(
        model,
        to,
        out,
        rank=rank,
        base=base,
        dtype=dtype,
        tokens=check_tokens,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
    print(result.model_dump_json(indent=1) if json_output else "\n".join(result.words()))
