"""twofold chat: a conversation in the terminal."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

import twofold
from twofold.cli.flags import Device, Dtype, Model, Trust


def command(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, above temperature 0.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Talk with a model; lines from a pipe are turns of one conversation."""
    with suppress(KeyboardInterrupt):  # the way to end it
        twofold.chat(**locals())
