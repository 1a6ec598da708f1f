"""What a refinement works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from twofold.calibrate.moments import Moments
from twofold.model.load import LoadedModel
from twofold.nn.places import dense_again
from twofold.objectives import Objective
from twofold.planning.plan import Plan
from twofold.refine import Stages
from twofold.task import Batch, Samples, Task
from twofold.task.output.quality import Predict, measure_quality


@dataclass(frozen=True)
class Job:
    """What a refinement works on."""

    loaded: LoadedModel  # with factored layers
    replaced: Mapping[str, nn.Module]  # the dense layers that they took the place of
    plan: Plan  # as it was carried out; a refinement that changes a form writes it there
    moments: Moments | None
    objective: Objective
    samples: Samples  # to train on
    held_out: Samples  # to stop on; may be empty
    task: Task
    recipe: Stages
    seconds: float | None = None  # that it may take
    folder: Path | None = None  # where its unfinished state is kept
    mark: str = ""  # what the state belongs to
    quiet: bool = False

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tested(self) -> Samples:
        """The samples that decide: the held-out ones, or the first of all where there are too few to have any."""
        return self.held_out if len(self.held_out) else self.samples[:1]

    def path(self, name: str) -> Path | None:
        """Return where a part of the unfinished state is kept; None if nothing is kept."""
        return None if self.folder is None else self.folder / name

    def outputs(self, batch: Batch) -> Tensor:  # (predictions, k)
        """Return what the factored model predicts.

        Raises:
            TwofoldError: if it gives no outputs of the task.
        """
        return self.task.outputs(self.model, batch)

    def dense_outputs(self, batch: Batch) -> Tensor:  # (predictions, k)
        """Return what the dense model predicts."""
        with dense_again(self.model, dict(self.replaced)):
            return self.outputs(batch)

    def divergence(self) -> float:
        """Return how far the factored model is from the dense one on the samples that decide, in nats a prediction."""
        tested = self.tested
        both: list[Predict] = [
            lambda i: self.dense_outputs(tested.batch(i, i + 1)),
            lambda i: self.outputs(tested.batch(i, i + 1)),
        ]
        divergence = measure_quality(both, tested, self.task, quiet=True)[1].divergence
        assert divergence is not None
        return divergence
