"""What a measurement works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from twofold.decompose.decompose import Decomposition
from twofold.model.weights import Target
from twofold.quantize.settings import Stored
from twofold.task.text.texts import TokenWindows


@dataclass(frozen=True)
class Measurement:
    """What a measurement for an allocation works on: a model in memory, its weights and their decompositions."""

    model: Any
    targets: list[Target]
    windows: TokenWindows | None  # that were calibrated on
    made: Decomposition
    settings: Stored
    quiet: bool = False
