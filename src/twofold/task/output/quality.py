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

    perplexity: float  # exp(loss), of language models
    loss: float  # nats a prediction
    tokens: int  # predictions
    divergence: float | None = None  # of this model from the first, nats a prediction
    agreement: float | None = None  # share of predictions in which both agree

    @classmethod
    def of(cls, loss: float, predictions: int, apart: float | None = None, agreed: float | None = None) -> Quality:
        """Take the means of what was summed over predictions."""
        mean = loss / predictions
        further = (None if total is None else total / predictions for total in (apart, agreed))
        return cls(math.exp(min(mean, 700.0)), mean, predictions, *further)


@torch.no_grad()
def measure_quality(models: Sequence[Predict], samples: Samples, task: Task, *, quiet: bool = False) -> list[Quality]:
    """Measure models side by side on the same samples, in one pass.

    Args:
        models: give the outputs of a sample; the first is the one that the others are compared with.
    """
    losses, divergences, agreed = ([0.0] * len(models) for _ in range(3))
    predictions = 0
    with progress("Measuring", len(samples) * len(models), unit="windows", quiet=quiet) as tick:
        for number, batch in enumerate(samples):
            labels = task.labels(batch)
            reference: Tensor | None = None
            for i, model in enumerate(models):
                loss, compared = task.output.score(model(number), labels)
                losses[i] += loss
                if i == 0:
                    predictions += len(compared)
                    reference = compared if len(models) > 1 else None
                else:
                    assert reference is not None
                    apart, same = task.output.divergence(reference, compared)
                    divergences[i] += apart
                    agreed[i] += same
                tick()
    first, *others = zip(losses, divergences, agreed, strict=True)
    return [
        Quality.of(first[0], predictions),
        *(Quality.of(loss, predictions, apart, same) for loss, apart, same in others),
    ]
