"""Some columns of a weight dense, the others of low rank: the inputs that a low rank serves worst are taken out of it.

With C = E[x xᵀ] (damped), K the dense inputs, R the others: x_K can make up for whatever it tells of x_R. So the factors A B of
W_R are its best approximation in what is left, S = C_RR − C_RK C_KK⁻¹ C_KR, at the loss Σ_{i>r} σ_i² of W_R S^½; then the dense
columns are D = W_K + (W_R − A B) C_RK C_KK⁻¹. K are the inputs with the largest error C_jj ‖(W − W_r)_j‖² of the truncation W_r
to half of the storage. For each rank without dense columns, the k of a small grid is taken that loses least in no more numbers.
Source: CPSVD (arXiv 2510.19385), which keeps the columns of W themselves and searches for k; D and S are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twofold.calibrate.moments import Moments
from twofold.linalg.gauge import gauge_rank, gauge_storage, plain_storage
from twofold.linalg.spectrum import Spectrum, decompose, gram, smaller_side, truncate
from twofold.model.structure import Structure
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.structures.weights import definite, is_transposed, wide, working

GRID = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)  # shares of the columns that may be dense, beside none


@dataclass(frozen=True)
class _Split:
    """A weight with some columns taken out, decomposed."""

    order: Tensor  # (n,), dense inputs first
    columns: int  # k
    rest: Tensor  # W_R (m, n − k)
    told: Tensor  # C_RK C_KK⁻¹ (n − k, k)
    metric: Tensor | None  # over the smaller side
    spectrum: Spectrum


class CutColumns:
    """A weight that is ready to be cut to the storage of any rank."""

    def __init__(self, structure: Structure, model: nn.Module, moments: Moments, damping: float) -> None:
        self.structure, self.module = structure, model.get_submodule(structure.name)
        moment = moments.layer(structure.name).input
        assert moment is not None
        self.weight = wide(self.module)  # (m, n)
        self.moment, _, _ = definite(working(moment.to(self.weight.device)), damping)  # (n, n)
        self.gauge = structure.members[0].form == "gauge"
        n = self.weight.shape[1]
        whole = self._split(torch.arange(n, device=self.weight.device), 0)
        order = self._errors(whole).argsort(descending=True, stable=True)
        counts = sorted({int(share * n) for share in GRID} - {0})
        self.splits = [whole, *(self._split(order, columns) for columns in counts)]
        chosen = [self._best(units) for units in range(1, structure.units)]
        losses = [
            self.splits[0].spectrum.tails[0],
            *(loss for _, _, loss in chosen),
            torch.zeros_like(self.moment[0, 0]),
        ]
        self.losses = torch.stack(losses)

    def layers(self, units: int, stored: torch.dtype) -> tuple[dict[str, FactoredLinear | DenseColumnsLinear], float]:
        split, rank, _ = self._best(units)
        layer = self._layer(split, rank, stored)
        if self.gauge and layer.form == "plain":  # no bounded coefficients: the same storage takes a smaller rank
            m, n = split.rest.shape
            layer = self._layer(split, max(gauge_storage(m, n, rank) // (m + n), 1), stored, plain=True)
        layer.requires_grad_(any(p.requires_grad for p in self.module.parameters()))
        missing = self.weight - layer.to_dense(self.weight.dtype)
        return {self.structure.name: layer}, float((missing @ self.moment * missing).sum())

    def _split(self, order: Tensor, columns: int) -> _Split:
        """Take the first columns of an order out, and decompose the others."""
        dense, rest = order[:columns].sort().values, order[columns:].sort().values
        weight, moment = self.weight[:, rest], self.moment[rest][:, rest]
        told = self.moment[rest][:, dense]
        if columns:
            known = torch.linalg.cholesky(self.moment[dense][:, dense])
            told = torch.cholesky_solve(told.T, known).T
            moment = moment - told @ self.moment[dense][:, rest]
            moment = (moment + moment.T) / 2
        side = smaller_side(*weight.shape)
        metric, product = (None, gram(weight, moment)) if side == "rows" else (moment, gram(weight, None))
        return _Split(torch.cat([dense, rest]), columns, weight, told, metric, decompose(metric, product, side))

    def _errors(self, whole: _Split) -> Tensor:  # (n,)
        """What each input adds to the loss of a truncation to half of the storage, by itself."""
        m, n = self.weight.shape
        rank = gauge_rank(m, n, m * n / 2) if self.gauge else m * n // 2 // (m + n)
        left, right = truncate(self.weight, whole.spectrum, whole.metric, max(rank, 1))
        return (self.weight - left @ right).square().sum(0) * self.moment.diagonal()

    def _best(self, units: int) -> tuple[_Split, int, Tensor]:
        """The split, its rank and the loss that are best in the storage of a rank without dense columns."""
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
        """The layer of one split and rank, rounded to the dtype that is stored, computing in that of the dense one."""
        own = getattr(self.module, "bias", None)
        bias = None if own is None else own.detach()
        left, right = truncate(split.rest, split.spectrum, split.metric, rank)
        turned, dtype = is_transposed(self.module), self.module.weight.dtype
        form = "auto" if self.gauge and not plain else "plain"
        if not split.columns:
            return FactoredLinear.from_factors(left, right, bias, form, turned, dtype=stored).to(dtype)  # type: ignore[arg-type]
        rest = FactoredLinear.from_factors(left, right, None, form, turned, dtype=stored)  # type: ignore[arg-type]
        dense = self.weight[:, split.order[: split.columns]] + (split.rest - left @ right) @ split.told
        return DenseColumnsLinear.around(rest, dense, split.order, bias, turned).to(dtype)  # type: ignore[arg-type]
