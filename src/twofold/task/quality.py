"""Perplexity of a model, and its divergence from the original, over windows that are each scored alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from twofold.host.progress import progress

ROWS = 256  # positions whose log-probabilities are held at once

Logits = Callable[[Tensor], Tensor]  # (1, window) → (1, window, vocabulary)


@dataclass(frozen=True)
class Quality:
    """What was measured of one model; the last two against the first model, None for that one itself."""

    perplexity: float  # exp(total negative log-likelihood / predicted tokens)
    loss: float  # nats per predicted token
    tokens: int  # predicted tokens
    divergence: float | None = None  # KL(first ‖ this), nats per token
    agreement: float | None = None  # share of positions with the same most likely token

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@torch.no_grad()
def measure_quality(
    models: Sequence[Logits],
    windows: Tensor,  # (count, window)
    *,
    quiet: bool = False,
) -> list[Quality]:
    """Measure models side by side on the same windows, in one pass.

    Args:
        models: functions from token ids (1, window) to logits; the first is the one that the others are compared with.
    """
    losses = [0.0] * len(models)
    divergences = [0.0] * len(models)
    agreed = [0] * len(models)
    with progress("Measuring", len(windows) * len(models), unit="windows", quiet=quiet) as tick:
        for ids in windows[:, None]:
            reference: Tensor | None = None  # log-probabilities of the first model
            for i, model in enumerate(models):
                loss, probabilities = score(model(ids), ids)
                losses[i] += loss
                if i == 0:
                    reference = probabilities if len(models) > 1 else None
                else:
                    assert reference is not None
                    further, same = divergence(reference, probabilities)
                    divergences[i] += further
                    agreed[i] += same
                tick()
    return [
        quality(losses[i], windows, *((divergences[i], agreed[i]) if i > 0 else (None, None)))
        for i in range(len(models))
    ]


def score(
    logits: Tensor,  # (1, window, vocabulary)
    ids: Tensor,  # (1, window)
) -> tuple[float, Tensor]:
    """The negative log-likelihood of one window, summed, and the log-probabilities (window − 1, vocabulary) in float32."""
    rows = logits[0, :-1]
    labels = ids[0, 1:].to(rows.device)
    probabilities = torch.cat([torch.log_softmax(some.float(), -1) for some in torch.split(rows, ROWS)])
    return -float(probabilities.gather(1, labels[:, None]).double().sum()), probabilities


def quality(
    loss: float,  # summed over positions, as the other two
    windows: Tensor,  # (count, window)
    apart: float | None = None,
    agreed: int | None = None,
) -> Quality:
    """The means per predicted token of what was summed over windows."""
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return Quality(
        math.exp(min(loss / predicted, 700.0)),
        loss / predicted,
        predicted,
        None if apart is None else apart / predicted,
        None if agreed is None else agreed / predicted,
    )


def divergence(
    first: Tensor,  # (positions, vocabulary), log-probabilities
    second: Tensor,
) -> tuple[float, int]:
    """KL(first ‖ second), summed over positions, and the positions with the same most likely token."""
    total, same = 0.0, 0
    for p, q in zip(torch.split(first, ROWS), torch.split(second, ROWS), strict=True):
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return max(total, 0.0), same
