"""How moments are collected."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from twofold.model.settings import Loading
from twofold.objectives import Method
from twofold.settings.base import Settings
from twofold.task import Tasked
from twofold.task.data.settings import Records
from twofold.task.output import Curvature
from twofold.task.text.settings import Measuring, Texts


class Moment(Settings):
    """How the moments of inputs and gradients are estimated."""

    TITLE = "Calibration"

    batch_size: Annotated[int, Field(ge=1, description="windows in a calibration batch; more takes more memory")] = 1
    curvature: Annotated[
        Curvature, Field(description="how the gradients' moments are estimated: sampled, gauss-newton, empirical")
    ] = "sampled"
    draws: Annotated[
        int | None,
        Field(
            ge=1,
            description="backward passes for each batch, each from a random gradient of its own; 1 for windows of text, and up "
            "to 8 where samples make few predictions",
        ),
    ] = None
    centre: Annotated[
        Literal["auto", "always", "never"],
        Field(
            description="take the mean off the inputs of layers with a bias, and put it into the bias: auto (but for decoders), "
            "always, never"
        ),
    ] = "auto"


class Calibrating(Loading, Tasked, Texts, Records, Measuring, Method, Moment):
    """All that the moments of a model depend on."""
