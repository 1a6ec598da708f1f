"""Logits over classes: the next token, a masked one, a class of images. The loss is the cross-entropy, the divergence is KL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twofold.task.output import Curvature, Output
from twofold.task.output.curvature import loss_gradient
from twofold.task.output.distillation import divergence, most_likely

ROWS = 256  # predictions whose log-probabilities are held at once


@dataclass(frozen=True)
class Categorical(Output):
    """Logits (predictions, classes)."""

    top: int = 128  # classes that are kept of a teacher's prediction, of eight bytes each

    name = "categorical"
    agreement = "same prediction"

    def probe(
        self, outputs: Tensor, labels: Tensor | None, generator: torch.Generator, curvature: Curvature = "sampled"
    ) -> Tensor:
        return loss_gradient(outputs, labels, generator, curvature)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        outputs, labels = labelled(outputs, labels)
        return nn.functional.cross_entropy(outputs, labels.to(outputs.device), reduction="sum")

    def score(self, outputs: Tensor, labels: Tensor | None) -> tuple[float, Tensor]:
        """Return the negative log-likelihood of the labels, and the log-probabilities (labelled, classes) in float32."""
        if labels is not None:
            outputs, labels = labelled(outputs, labels)
        probabilities = torch.cat([torch.log_softmax(rows.float(), -1) for rows in torch.split(outputs, ROWS)])
        if labels is None:
            return 0.0, probabilities
        own = probabilities.gather(1, labels.to(probabilities.device)[:, None])
        return -float(own.double().sum()), probabilities

    def divergence(self, first: Tensor, second: Tensor) -> tuple[float, float]:
        """Return KL(first ‖ second), and the predictions with the same most likely class."""
        total, same = 0.0, 0
        for p, q in zip(torch.split(first, ROWS), torch.split(second, ROWS), strict=True):
            total += float((p.exp() * (p - q)).sum(-1).double().sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
        return max(total, 0.0), same

    def keep(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return the log-probabilities of the most likely classes, and which they are."""
        values, classes = most_likely(outputs, self.top)
        return {"values": values, "classes": classes}

    def likeness(
        self,
        states: Tensor,
        kept: Mapping[str, Tensor],
        labels: Tensor | None,
        share: float = 0.0,
        head: nn.Linear | None = None,
    ) -> Tensor:
        """Return KL(teacher ‖ model), where all but the classes that were kept count as one."""
        return divergence(states, kept["values"], kept["classes"], labels=labels, share=share, head=head)


def labelled(
    outputs: Tensor,  # (predictions, k)
    labels: Tensor,  # (predictions,)
) -> tuple[Tensor, Tensor]:
    """Return the predictions that have a label, and the labels; without a copy where they come first."""
    has = labels >= 0
    count = int(has.sum())
    if bool(has[:count].all()):
        return outputs[:count], labels[:count]
    return outputs[has.to(outputs.device)], labels[has]


CATEGORICAL = Categorical()
