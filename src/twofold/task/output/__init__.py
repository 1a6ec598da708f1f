"""What the numbers of a model mean: a loss, its curvature, and how far two models are apart; all in nats a prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from twofold.errors import TwofoldError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Curvature: TypeAlias = Literal["sampled", "gauss-newton", "empirical"]


class Output(ABC):
    """The meaning of outputs (predictions, k), and of labels, which are one a prediction.

    Labels of classes are (predictions,), −1 where nothing is known; those of features are (predictions, k).
    """

    name: ClassVar[str]
    agreement: ClassVar[str]  # what is counted as two models agreeing, in words

    @abstractmethod
    def probe(
        self,
        outputs: Tensor,  # (predictions, k)
        labels: Tensor | None,  # (predictions, …)
        generator: torch.Generator,
        curvature: Curvature = "sampled",
    ) -> Tensor:  # (predictions, k)
        """Return a random v for each prediction with E[v vᵀ] = the second derivative of its loss.

        Raises:
            TwofoldError: if the curvature needs labels, and there are none.
        """

    @abstractmethod
    def loss(
        self,
        outputs: Tensor,  # (predictions, k)
        labels: Tensor,  # (predictions, …)
    ) -> Tensor:  # ()
        """Return the loss of the labels, summed over the predictions that have one, with its graph."""

    def known(self, labels: Tensor | None) -> int:
        """Return how many predictions have a label."""
        return 0 if labels is None else int((labels >= 0).sum())

    @abstractmethod
    def score(
        self,
        outputs: Tensor,  # (predictions, k)
        labels: Tensor | None,  # (predictions, …)
    ) -> tuple[float, Tensor]:
        """Return the loss of the labels, summed, and what ``divergence`` compares, for the predictions that have a label.

        Without labels the loss is 0, and every prediction is compared.
        """

    @abstractmethod
    def divergence(self, first: Tensor, second: Tensor) -> tuple[float, float]:
        """Return how far the second is from the first and how much both agree (1 a prediction at the most), each summed.

        Args:
            first, second: what ``score`` gave of the same predictions.
        """

    @abstractmethod
    def keep(
        self,
        outputs: Tensor,  # (predictions, k)
    ) -> dict[str, Tensor]:  # (predictions, …) each
        """Return what ``likeness`` needs to know of a teacher's outputs, on the processor."""

    @abstractmethod
    def likeness(
        self,
        states: Tensor,  # (predictions, k), the outputs; or (predictions, width), what the head is given
        kept: Mapping[str, Tensor],  # (predictions, …) each, as ``keep`` gave it
        labels: Tensor | None,  # (predictions, …)
        share: float = 0.0,
        head: nn.Linear | None = None,
    ) -> Tensor:  # ()
        """Return how far a model is from its teacher, in nats, the mean over predictions, with its graph.

        Args:
            share: of the loss of the labels in what is returned; the divergence has the rest.
            head: the layer that makes outputs of states; its weight gets no gradient.
        """


def need_labels(labels: Tensor | None, setting: str) -> Tensor:
    """Return the labels that a setting looks at.

    Raises:
        TwofoldError: if there are none.
    """
    if labels is None:
        raise TwofoldError(
            f"`{setting}` looks at what is right for each prediction, and the data does not say it; leave it out"
        )
    return labels
