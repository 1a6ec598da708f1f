"""twofold chat: a conversation in the terminal."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or smollm2.")],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, above temperature 0.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the computation; auto is float32 on a processor.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
) -> None:
    """Talk with a model; lines from a pipe are turns of one conversation."""
    from twofold.serving.chat import chat

    with suppress(KeyboardInterrupt):  # the way to end it
        chat(
            model,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
