"""twofold serve: OpenAI's API of one model."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or smollm2.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    queue: Annotated[int, typer.Option(min=1, help="Requests at once, waiting ones too; more are refused.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of the computation; auto is float32 on a processor.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
) -> None:
    """Answer chat and completion requests as OpenAI's API does, until it is stopped."""
    from twofold.serving.server import serve

    with suppress(KeyboardInterrupt):  # the way to end it
        serve(
            model,
            host=host,
            port=port,
            queue=queue,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
