"""The metric in which a change of a layer is measured: that of the calibration, where moments are kept, or else the plain one.

Of the two sides of a layer the calibration may have kept only what depends on the weight itself (W C Wᵀ, Wᵀ G W). For another
weight that side has its trace alone: it counts as a multiple of the identity, which keeps the losses of all layers on one scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twofold.calibrate.moments import Moments
from twofold.linalg.metric import Metric, damp
from twofold.linalg.spectrum import Spectrum, gram, smaller_side, spectrum_of, truncate
from twofold.objectives import Method

DAMPING: float = Method.model_fields["damping"].default


@dataclass(frozen=True)
class LayerMetric:
    """G over the outputs and C over the inputs of one layer; None stands for the identity."""

    left: Metric = None  # over m
    right: Metric = None  # over n

    def decompose(
        self,
        change: Tensor,  # (m, n)
    ) -> Decomposed:
        """A change of the layer for every rank."""
        side = smaller_side(*change.shape)
        near, far = (self.left, self.right) if side == "rows" else (self.right, self.left)
        return Decomposed(change, spectrum_of(near, gram(change, far), side), near)


@dataclass(frozen=True)
class Decomposed:
    """A matrix in a metric, for every rank."""

    matrix: Tensor  # (m, n)
    spectrum: Spectrum
    near: Metric

    @property
    def values(self) -> Tensor:  # (k,)
        """σ², largest first: what each direction counts."""
        return self.spectrum.values

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:  # (m, rank), (rank, n)
        """The best approximation of a rank."""
        return truncate(self.matrix, self.spectrum, self.near, rank)


class Metrics:
    """The metrics of a model's layers, from a folder of moments; plain without one."""

    def __init__(self, folder: Path | None = None) -> None:
        self.moments = Moments.load(folder) if folder is not None else None
        self.whole = self.partly = self.plain = 0  # layers by how much of their metric is known

    def of(
        self,
        name: str,
        weight: Tensor,  # (m, n), for its shape, dtype and device
    ) -> LayerMetric:
        """The metric of one layer."""
        m, n = weight.shape
        found = self.moments.layer(name) if self.moments is not None else None
        left = right = None
        if found is not None and found.gradient is not None and len(found.gradient) == m:
            left = damp(found.gradient.to(weight), DAMPING)
        if found is not None and found.input is not None and len(found.input) == n:
            right = damp(found.input.to(weight), DAMPING)
        if left is not None and right is not None:
            self.whole += 1
            return LayerMetric(left, right)
        if left is None and right is None:
            self.plain += 1
            return LayerMetric()
        self.partly += 1
        if left is None:
            trace = found.gradient_trace if found is not None else 0.0
            return LayerMetric(torch.full((m,), trace / m).to(weight) if trace > 0 else None, right)
        trace = found.input_trace if found is not None else 0.0
        return LayerMetric(left, torch.full((n,), trace / n).to(weight) if trace > 0 else None)

    @property
    def words(self) -> str:
        """Which metric it was, for a reader."""
        if self.moments is None:
            return "in the plain metric: no moments were named"
        return (
            f"in the calibrated metric for {self.whole} layers, with one side of it for {self.partly}, in the plain one for "
            f"{self.plain}"
        )
