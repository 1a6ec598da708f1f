"""What a measurement for an allocation works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from twofold.decompose.decompose import Decomposition
from twofold.linalg.spectrum import Spectrum
from twofold.model.kinds import dense_weight
from twofold.model.target import Target
from twofold.objectives import Problem
from twofold.quantize.settings import Stored
from twofold.task import Samples, Task


@dataclass(frozen=True)
class Measurement:
    """A model in memory with its weights and their decompositions."""

    model: Any
    task: Task | None
    targets: list[Target]
    samples: Samples | None  # that were calibrated on
    decomposition: Decomposition
    settings: Stored
    quiet: bool = False

    def decomposed(self, target: Target) -> tuple[Problem, Spectrum, Tensor]:
        """Return the problem of a target, its spectrum in the precision of the problem, and its weight (out, in)."""
        problem = self.decomposition.problem(self.model, target)
        weight = dense_weight(self.model.get_submodule(target.name)).detach()
        return problem, self.decomposition.spectrum(target, problem), weight
