"""The gauge form: a product of rank r stored in r(m + n − r) numbers, exactly.

A product A B, A (m, r), B (r, n), does not change under A R, R⁻¹ B: r² of its r(m + n) numbers are redundant.
Taking R so that r chosen rows of A (the pivots) become the identity leaves
- rows:    y_J = B′x, y_rest = T y_J, with B′ = (A B)_J (r, n) and T ((m − r), r);
and the mirror image, where r columns of B become the identity,
- columns: y = A′ (x_K + S x_rest), with A′ = (A B)_K (m, r) and S (r, (n − r)).
The pivots come from LU with partial pivoting, then pairs are swapped until every coefficient is at most
``BOUND`` in magnitude (maxvol, Goreinov et al. 2010): each swap multiplies the volume of the pivot block by more
than that, so it ends. Bounded coefficients are what keeps the form accurate in low precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

BOUND = 2.0  # the largest coefficient that is accepted without a swap
SWAPS = 200  # the most swaps; LU pivots need few


@dataclass(frozen=True)
class GaugeForm:
    """A product in gauge form.

    ``reduce`` and ``expand`` are the two stored matrices in the order in which an input meets them: for rows
    B′ (r, n) and T (m − r, r), for columns S (r, n − r) and A′ (m, r). ``order`` is a permutation: of the outputs
    for rows (output i is entry order[i] of [y_J, y_rest]), of the inputs for columns (the pivots come first).
    """

    form: Literal["rows", "columns"]
    reduce: Tensor
    expand: Tensor
    order: Tensor  # (m,) for rows, (n,) for columns, int32
    largest: float  # the largest coefficient in magnitude


class Shaped(Protocol):
    """A weight (m, n)."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...


def plain_storage(out_features: int, in_features: int, rank: int) -> int:
    """Count the numbers that a plain product of two factors stores: r (m + n)."""
    return rank * (out_features + in_features)


def gauge_storage(out_features: int, in_features: int, rank: int) -> int:
    """Count the numbers that the gauge form stores: r (m + n − r), which is m·n at full rank."""
    return rank * (out_features + in_features - rank)


def rank_numbers(form: str, weight: Shaped, rank: int) -> int:
    """Count the numbers that a rank stores in a form."""
    count = plain_storage if form == "plain" else gauge_storage
    return count(weight.out_features, weight.in_features, rank)


def order_integers(form: str, weight: Shaped) -> int:
    """Count the integers of the order; for a form not chosen yet, of the longer of the two."""
    m, n = weight.out_features, weight.in_features
    return {"rows": m, "columns": n, "gauge": max(m, n)}.get(form, 0)


def gauge_rank(out_features: int, in_features: int, numbers: float) -> int:
    """Find the largest rank whose gauge form stores at most ``numbers``: r = ((m+n) − √((m+n)² − 4·numbers)) / 2."""
    total = out_features + in_features
    inside = total * total - 4 * min(numbers, out_features * in_features)
    rank = int((total - math.sqrt(max(inside, 0.0))) / 2 + 1e-9)
    return min(rank, out_features, in_features)


def _pivot(
    thin: Tensor,  # (p, r)
) -> tuple[Tensor, Tensor, float] | None:  # pivots first (p,), coefficients (p − r, r), largest
    """Choose r rows of a thin matrix such that the other rows are combinations of them with small coefficients."""
    p, r = thin.shape
    scale = thin.norm(dim=0).clamp_min(torch.finfo(thin.dtype).tiny)
    compact, swaps, info = torch.linalg.lu_factor_ex(thin / scale)
    if int(info) != 0:
        return None
    permutation = torch.arange(p)
    for i, j in enumerate((swaps.cpu() - 1).tolist()):
        permutation[[i, j]] = permutation[[j, i]]
    unit = compact.tril(-1)
    unit.diagonal().fill_(1)  # (p, r), lower trapezoidal
    # T = L₂ L₁⁻¹
    coefficients = torch.linalg.solve_triangular(unit[:r], unit[r:], upper=False, left=False, unitriangular=True)
    for _ in range(SWAPS):
        if coefficients.numel() == 0:
            return permutation, coefficients, 0.0
        flat = int(coefficients.abs().argmax())
        i, j = divmod(flat, r)
        value = coefficients[i, j].clone()
        if not torch.isfinite(value):
            return None
        if value.abs() <= BOUND:
            break
        # Swap pivot j with row i: a rank-one update of the coefficients.
        column, row = coefficients[:, j].clone(), coefficients[i].clone()
        coefficients -= torch.outer(column, row) / value
        coefficients[:, j] = column / value
        coefficients[i] = -row / value
        coefficients[i, j] = 1 / value
        permutation[[j, r + i]] = permutation[[r + i, j]]
    return permutation, coefficients, float(coefficients.abs().max())


def gauge_form(
    left: Tensor,  # (m, r)
    right: Tensor,  # (r, n)
    form: Literal["auto", "rows", "columns"] = "auto",
) -> GaugeForm | None:
    """Bring the product of two factors into gauge form: on rows or columns, whichever has the smaller coefficients.

    Pivots are sought on the thin factor alone; no decomposition of the whole product is needed. Returns None where no
    side has bounded coefficients (a factor without full rank), so that the caller can store the plain factors.
    """
    m, r = left.shape
    n = right.shape[1]
    if right.shape[0] != r:
        raise ValueError(f"the factors do not fit: left is {tuple(left.shape)}, right is {tuple(right.shape)}")
    forms: list[GaugeForm] = []
    if form != "columns" and r < m and (pivoted := _pivot(left)) is not None:
        permutation, coefficients, largest = pivoted
        base = left[permutation[:r].to(left.device)] @ right
        forms.append(GaugeForm("rows", base, coefficients, permutation.argsort().to(torch.int32), largest))
    if form != "rows" and r < n and (pivoted := _pivot(right.mT)) is not None:
        permutation, coefficients, largest = pivoted
        base = left @ right[:, permutation[:r].to(right.device)]
        forms.append(GaugeForm("columns", coefficients.mT, base, permutation.to(torch.int32), largest))
    bounded = [
        gauge
        for gauge in forms
        if gauge.largest <= BOUND and torch.isfinite(gauge.reduce).all() and torch.isfinite(gauge.expand).all()
    ]
    return min(bounded, key=lambda gauge: gauge.largest, default=None)
