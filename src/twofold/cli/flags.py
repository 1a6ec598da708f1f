"""The flags that several commands have, each in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or smollm2.")]
Against = Annotated[str | None, typer.Option(help="The original model to compare with.")]
Dtype = Annotated[str, typer.Option(help="Of the computation; auto is float32 on a processor.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Dequantize = Annotated[bool, typer.Option("--dequantize", help="Turn quantized weights into ordinary ones.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
Moments = Annotated[Path | None, typer.Option(help="Folder of the moments \\[default: in the cache].")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Lang = Annotated[str, typer.Option(help="The language of the page: en or es.")]
