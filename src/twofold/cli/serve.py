"""twofold serve: OpenAI's API of one model."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

import twofold
from twofold.cli.flags import Device, Dtype, Model, Trust


def command(
    model: Model,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    queue: Annotated[int, typer.Option(min=1, help="Requests at once, waiting ones too; more are refused.")] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Answer chat and completion requests as OpenAI's API does, until it is stopped."""
    with suppress(KeyboardInterrupt):  # the way to end it
        twofold.serve(**locals())
