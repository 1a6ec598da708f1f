"""Some columns of a weight dense, the others of low rank: the inputs that a low rank serves worst are taken out of it.

With C = E[x xᵀ] (damped), K the dense inputs, R the others: x_K can make up for whatever it tells of x_R. So the factors A B of
W_R are its best approximation in what is left, S = C_RR − C_RK C_KK⁻¹ C_KR, at the loss Σ_{i>r} σ_i² of W_R S^½; then the dense
columns are D = W_K + (W_R − A B) C_RK C_KK⁻¹. K are the inputs with the largest error C_jj ‖(W − W_r)_j‖² of the truncation W_r
to half of the storage. For each rank without dense columns, the k of a small grid is taken that loses least in no more numbers.
Source: CPSVD (arXiv 2510.19385), which keeps the columns of W themselves and searches for k; D and S are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.calibrate.moments import Moments
from twofold.linalg.gauge import gauge_rank, gauge_storage, plain_storage
from twofold.linalg.spectrum import Spectrum, gram, smaller_side, spectrum_of, truncate
from twofold.model.structure import Structure
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.structures.weights import definite, energy, settle, wide

GRID = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)  # shares of the columns that may be dense, beside none


@dataclass(frozen=True)
class _Split:
    """A weight with some columns taken out, decomposed."""

    order: Tensor  # (n,), dense inputs first
    columns: int  # k
    rest: Tensor  # W_R (m, n − k)
    regression: Tensor  # C_RK C_KK⁻¹ (n − k, k)
    metric: Tensor | None  # over the smaller side
    spectrum: Spectrum


class CutColumns:
    """A weight that is ready to be cut to the storage of any rank."""

    def __init__(self, structure: Structure, model: nn.Module, moments: Moments, damping: float) -> None:
        self.structure, self.module = structure, model.get_submodule(structure.name)
        self.weight = wide(self.module)  # (m, n)
        self.moment, _, _ = definite(moments.layer(structure.name), damping, self.weight.device)  # (n, n)
        self.gauge = structure.members[0].form == "gauge"
        n = self.weight.shape[1]
        whole = self._split(torch.arange(n, device=self.weight.device), 0)
        order = self._errors(whole).argsort(descending=True, stable=True)
        counts = sorted({int(share * n) for share in GRID} - {0})
        self.splits = [whole, *(self._split(order, columns) for columns in counts)]
        losses = [self._best(units)[2] for units in range(1, structure.units)]
        self.losses = torch.stack([whole.spectrum.tails[0], *losses, torch.zeros_like(self.moment[0, 0])])

    def layers(self, units: int, stored: torch.dtype) -> tuple[dict[str, FactoredLinear | DenseColumnsLinear], float]:
        split, rank, _ = self._best(units)
        layer = self._layer(split, rank, stored)
        if self.gauge and layer.form == "plain":  # no bounded coefficients: the same storage takes a smaller rank
            m, n = split.rest.shape
            layer = self._layer(split, max(gauge_storage(m, n, rank) // (m + n), 1), stored, plain=True)
        settle(layer, self.module)
        return {self.structure.name: layer}, energy(self.weight - layer.to_dense(self.weight.dtype), self.moment)

    def _split(self, order: Tensor, columns: int) -> _Split:
        """Take the first columns of an order out, and decompose the others."""
        dense, rest = order[:columns].sort().values, order[columns:].sort().values
        weight, moment = self.weight[:, rest], self.moment[rest][:, rest]
        regression = self.moment[rest][:, dense]
        if columns:
            factor = torch.linalg.cholesky(self.moment[dense][:, dense])
            regression = torch.cholesky_solve(regression.T, factor).T
            moment = moment - regression @ self.moment[dense][:, rest]
            moment = (moment + moment.T) / 2
        side = smaller_side(*weight.shape)
        metric, far = (moment, None) if side == "columns" else (None, moment)
        spectrum = spectrum_of(metric, gram(weight, far), side)
        return _Split(torch.cat([dense, rest]), columns, weight, regression, metric, spectrum)

    def _errors(self, whole: _Split) -> Tensor:  # (n,)
        """Return what each input adds to the loss of a truncation to half of the storage, by itself."""
        m, n = self.weight.shape
        rank = gauge_rank(m, n, m * n / 2) if self.gauge else m * n // 2 // (m + n)
        left, right = truncate(self.weight, whole.spectrum, whole.metric, max(rank, 1))
        return (self.weight - left @ right).square().sum(0) * self.moment.diagonal()

    def _best(self, units: int) -> tuple[_Split, int, Tensor]:
        """Find the split, its rank and the loss that are best in the storage of a rank without dense columns."""
        m, n = self.weight.shape
        numbers = (gauge_storage if self.gauge else plain_storage)(m, n, units)
        options = []
        for split in self.splits:
            left, inner = numbers - m * split.columns, n - split.columns
            rank = units
            if split.columns and left > 0:
                rank = min(gauge_rank(m, inner, left) if self.gauge else left // (m + inner), m, inner)
            if rank >= 1 and left > 0:
                options.append((split, rank, split.spectrum.tails[rank]))
        return min(options, key=lambda option: float(option[2]))

    def _layer(self, split: _Split, rank: int, stored: torch.dtype, plain: bool = False) -> FactoredLinear:
        """Return the layer of one split and rank, rounded to the dtype that is stored."""
        bias, transposed = getattr(self.module, "bias", None), isinstance(self.module, Conv1D)
        form: Literal["auto", "plain"] = "auto" if self.gauge and not plain else "plain"
        left, right = truncate(split.rest, split.spectrum, split.metric, rank)
        own = None if split.columns else bias
        factored = FactoredLinear.from_factors(left, right, own, form, transposed, dtype=stored)
        if not split.columns:
            return factored
        dense = self.weight[:, split.order[: split.columns]] + (split.rest - left @ right) @ split.regression
        return DenseColumnsLinear.around(factored, dense, split.order, bias, transposed)
