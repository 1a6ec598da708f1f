"""How good a model is, and how far from the original, over samples that are each scored alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from twofold.host.progress import progress
from twofold.task import Samples, Task

Predict: TypeAlias = Callable[[int], Tensor]  # the number of a sample → outputs (predictions, k)


@dataclass(frozen=True)
class Quality:
    """What was measured of one model; the last two against the first model, None for that one itself."""

    perplexity: float | None  # exp(loss), of tasks that go by it
    loss: float | None  # nats a prediction, where it is known what is right
    tokens: int  # predictions
    divergence: float | None = None  # of this model from the first, nats a prediction
    agreement: float | None = None  # of both, a prediction: the share of the same ones, or the mean cosine


@dataclass
class Totals:
    """Sums over the predictions of a model."""

    task: Task
    loss: float = 0.0
    known: int = 0  # predictions with a label
    predictions: int = 0
    apart: float | None = None  # divergence from the first model
    agreed: float | None = None

    def score(
        self,
        outputs: Tensor,  # (predictions, k)
        labels: Tensor | None,
    ) -> Tensor:
        """Add the loss of a sample; return what ``compare`` takes of the first model."""
        loss, compared = self.task.output.score(outputs, labels)
        self.loss, self.known = self.loss + loss, self.known + self.task.output.known(labels)
        self.predictions += len(compared)
        return compared

    def compare(self, first: Tensor, own: Tensor) -> None:
        """Add how far a sample is from that of the first model."""
        apart, agreed = self.task.output.divergence(first, own)
        self.apart, self.agreed = (self.apart or 0.0) + apart, (self.agreed or 0.0) + agreed

    @property
    def quality(self) -> Quality:
        """The means."""
        loss = self.loss / self.known if self.known else None
        perplexity = None if loss is None or not self.task.perplexity else math.exp(min(loss, 700.0))
        apart, agreed = (None if total is None else total / self.predictions for total in (self.apart, self.agreed))
        if apart is not None:
            apart = max(apart, 0.0)  # less is rounding
        return Quality(perplexity, loss, self.predictions, apart, agreed)


@torch.no_grad()
def measure_quality(models: Sequence[Predict], samples: Samples, task: Task, *, quiet: bool = False) -> list[Quality]:
    """Measure models side by side on the same samples, in one pass.

    Args:
        models: give the outputs of a sample; the first is the one that the others are compared with.
    """
    sums = [Totals(task) for _ in models]
    with progress("Measuring", len(samples) * len(models), unit=samples.each, quiet=quiet) as tick:
        for number, batch in enumerate(samples):
            labels = task.labels(batch)
            reference: Tensor | None = None
            for model, totals in zip(models, sums, strict=True):
                compared = totals.score(model(number), labels)
                if reference is not None:
                    totals.compare(reference, compared)
                elif len(models) > 1:
                    reference = compared
                tick()
    return [totals.quality for totals in sums]
