"""Features, each a mean with noise of variance 1: the loss is ½‖y − label‖², and the divergence from another mean ½‖a − b‖².

A task gives its features on the scale of that noise. Then the second derivative of the loss is the identity, and a nat is what
it is for classes: KL(N(a, I) ‖ N(b, I)) = ½‖a − b‖².
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from twofold.task.output import Curvature, Output, need_labels


class Gaussian(Output):
    """Features (predictions, k), and labels that are features too, if there are any."""

    name = "gaussian"
    agreement = "cosine"

    def probe(
        self, outputs: Tensor, labels: Tensor | None, generator: torch.Generator, curvature: Curvature = "sampled"
    ) -> Tensor:
        """Return the noise of a draw (sampled), random signs (gauss-newton), or y − label (empirical)."""
        if curvature == "empirical":
            return outputs.detach() - need_labels(labels, "curvature=empirical").to(outputs)
        if curvature == "gauss-newton":
            return torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
        return torch.randn(outputs.shape, generator=generator).to(outputs)

    def known(self, labels: Tensor | None) -> int:
        return 0 if labels is None else len(labels)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - labels.to(outputs)).square().sum() / 2

    def score(self, outputs: Tensor, labels: Tensor | None) -> tuple[float, Tensor]:
        """Return ½‖y − label‖², and the features in float32, or in float64 if they are."""
        wide = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        return 0.0 if labels is None else _half_square(wide, labels), wide

    def divergence(self, first: Tensor, second: Tensor) -> tuple[float, float]:
        """Return ½‖first − second‖², and the cosine of both."""
        return _half_square(first, second), float(torch.cosine_similarity(first, second, -1).double().sum())

    def keep(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"features": self.score(outputs, None)[1].cpu()}

    def likeness(
        self,
        states: Tensor,
        kept: Mapping[str, Tensor],
        labels: Tensor | None,
        share: float = 0.0,
        head: nn.Linear | None = None,
    ) -> Tensor:
        outputs = states if head is None else head(states.to(head.weight.dtype))
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        total = (1 - share) * self.loss(outputs, kept["features"])
        if share:
            total = total + share * self.loss(outputs, need_labels(labels, f"refine_labels={share:g}"))
        return total / len(outputs)


def _half_square(first: Tensor, second: Tensor) -> float:
    return float((first.cpu().double() - second.cpu().double()).square().sum() / 2)


GAUSSIAN = Gaussian()
