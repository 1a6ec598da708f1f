"""twofold explore: the page of a run, with both models to ask."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

import twofold
from twofold.cli.flags import Against, Device, Dtype, Lang


def command(
    folder: Annotated[Path, typer.Argument(help="The --out of a compression, or a folder with several.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes a free one.")] = 8321,
    against: Against = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    lang: Lang = "en",
) -> None:
    """Serve the page of a run on this machine, with a text to type that the original and the factored model read."""
    with suppress(KeyboardInterrupt):  # the way to end it
        twofold.explore(**locals())
