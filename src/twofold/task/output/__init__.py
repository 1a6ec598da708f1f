"""What the numbers of a model mean: a loss, its curvature, and how far two models are apart; all in nats a prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Curvature: TypeAlias = Literal["sampled", "gauss-newton", "empirical"]


class Output(ABC):
    """The meaning of outputs (predictions, k), and of labels (predictions,), which are −1 where there is none."""

    name: ClassVar[str]

    @abstractmethod
    def probe(
        self,
        outputs: Tensor,  # (predictions, k)
        labels: Tensor | None,  # (predictions,)
        generator: torch.Generator,
        curvature: Curvature = "sampled",
    ) -> Tensor:  # (predictions, k)
        """Return a random v for each prediction with E[v vᵀ] = the second derivative of its loss."""

    @abstractmethod
    def loss(
        self,
        outputs: Tensor,  # (predictions, k)
        labels: Tensor,  # (predictions,)
    ) -> Tensor:  # ()
        """Return the loss of the labels, summed over the predictions that have one, with its graph."""

    @abstractmethod
    def score(
        self,
        outputs: Tensor,  # (predictions, k)
        labels: Tensor | None,  # (predictions,)
    ) -> tuple[float, Tensor]:
        """Return the loss of the labels, summed, and what ``divergence`` compares, for the predictions that have a label."""

    @abstractmethod
    def divergence(self, first: Tensor, second: Tensor) -> tuple[float, int]:
        """Return how far the second is from the first, summed, and in how many predictions they agree, of what ``score`` gave."""
