"""The metric in which a change of a layer is measured: that of the calibration, where moments are kept, or else the plain one.

Of the two sides of a layer the calibration may have kept only what depends on the weight itself (W C Wᵀ, Wᵀ G W). For another
weight that side has its trace alone: it counts as a multiple of the identity, which keeps the losses of all layers on one scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from twofold.calibrate.moments import Moments
from twofold.linalg.metric import damp
from twofold.linalg.spectrum import gram, smaller_side, spectrum_of, truncate
from twofold.objectives import LayerMoments, Method

DAMPING: float = Method.model_fields["damping"].default


class Metrics:
    """The metrics of a model's layers, from a folder of moments; plain without one."""

    def __init__(self, folder: Path | None = None) -> None:
        self.moments = Moments.load(folder) if folder is not None else None
        self.layers = [0, 0, 0]  # that were decomposed, by how many sides of their metric are known

    def decompose(
        self,
        name: str,
        matrix: Tensor,  # (m, n)
    ) -> tuple[Tensor, Callable[[int], tuple[Tensor, Tensor]]]:
        """Decompose a change of a layer in the layer's metric: G over the outputs, C over the inputs.

        Returns:
            σ² (k,), largest first, and a function from a rank to the best approximation, (m, rank) and (rank, n).
        """
        side = smaller_side(*matrix.shape)
        moments = LayerMoments() if self.moments is None else self.moments.layer(name)
        metrics = [
            None if moment is None or len(moment) != size else damp(moment.to(matrix), DAMPING)
            for moment, size in zip((moments.gradient, moments.input), matrix.shape, strict=True)
        ]
        known = sum(metric is not None for metric in metrics)
        self.layers[known] += 1
        if known == 1:
            i = 0 if metrics[0] is None else 1
            trace, size = (moments.gradient_trace, moments.input_trace)[i], matrix.shape[i]
            metrics[i] = torch.full((size,), trace / size).to(matrix) if trace > 0 else None
        near, far = metrics if side == "rows" else metrics[::-1]
        spectrum = spectrum_of(near, gram(matrix, far), side)
        return spectrum.values, partial(truncate, matrix, spectrum, near)

    @property
    def words(self) -> str:
        """Say for a reader which metric it was."""
        if self.moments is None:
            return "in the plain metric: no moments were named"
        plain, partly, whole = self.layers
        return f"in the calibrated metric for {whole} layers, with one side of it for {partly}, in the plain one for {plain}"
