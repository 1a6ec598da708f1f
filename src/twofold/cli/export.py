"""twofold export: a model in the form that another program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import twofold
from twofold.cli.flags import Dequantize, Json, Quiet, Trust
from twofold.cli.tables import run_command
from twofold.cli.words import with_flags
from twofold.exports.formats import FORMATS


def command(
    model: Annotated[str, typer.Argument(help="The folder of a factored checkpoint; some formats take any model.")],
    to: Annotated[str, typer.Option(help=f"The format: {', '.join(FORMATS.names())}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Of a LoRA adapter; by default what is exact.")] = None,
    base: Annotated[str | None, typer.Option(help="The original, or its .gguf file, where a format needs it.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto is the stored one, float32 for runtimes.")] = "auto",
    check_tokens: Annotated[int, typer.Option(min=0, help="Tokens to decode in both, for the comparison.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that Twofold wrote.")] = False,
    trust_remote_code: Trust = False,
    dequantize: Dequantize = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model for another program, and compare what that program will compute with the model."""
    run_command(twofold.export, {**locals()}, lambda exported: print(with_flags("\n".join(exported.words()))))
