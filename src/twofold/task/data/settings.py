"""Which fields of a row are read, and how many samples a model is calibrated on where they are no windows of tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from twofold.settings.base import Settings
from twofold.task.text.settings import Reading


class Columns(Reading):
    """The fields of a row. One that is not named is found by its usual names."""

    TITLE = "Rows"

    audio_column: Annotated[str, Field(description="the field of a row that holds its audio, or names the file")] = (
        "audio"
    )
    image_column: Annotated[str, Field(description="the field of a row that holds its image, or names the file")] = (
        "image"
    )
    target_column: Annotated[
        str, Field(description="the field of a row that holds what its text becomes, or the second sentence of a pair")
    ] = "target"
    label_column: Annotated[str, Field(description="the field of a row that holds its label")] = "label"


class Sampled(Settings):
    """How many samples are read."""

    TITLE = "Calibration"

    samples: Annotated[
        int, Field(ge=1, description="clips, images or sentences to calibrate on, where they are no windows of tokens")
    ] = 256


class Records(Columns, Sampled):
    """What a model is calibrated on where it does not read windows of tokens."""

    TITLE = "Calibration"
