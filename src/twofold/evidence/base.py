"""What a measurement works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from twofold.decompose.decompose import Decomposition
from twofold.model.target import Target
from twofold.quantize.settings import Stored
from twofold.task import Samples, Task


@dataclass(frozen=True)
class Measurement:
    """What a measurement for an allocation works on: a model in memory, its weights and their decompositions."""

    model: Any
    task: Task | None
    targets: list[Target]
    samples: Samples | None  # that were calibrated on
    made: Decomposition
    settings: Stored
    quiet: bool = False
