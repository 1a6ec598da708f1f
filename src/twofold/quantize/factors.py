"""The factors of one weight in integers, such that the product loses little in the metric that ranks are chosen in.

A product A B does not change under A R, R⁻¹ B. That freedom, which the gauge form spends on storing fewer numbers, is spent
here on numbers that round well: with the basis of a spectrum, orthonormal in the metric, R is the balanced scale σ^½ followed
by an orthogonal matrix, drawn at random, that spreads every direction over all components. So no component is large beside its
neighbours in a group, and none has an entry that is large beside the others.

The factor over the smaller side is rounded first. What it was rounded to spans another space than the best one, but the other
factor is then the best for *it*: outer = (Aᵀ M A)⁻¹ Aᵀ M W, the projector of linalg/spectrum.py. Only the rounding of that
second factor is left without an answer. Measured on real layers: docs/quantize.md.

In eight bits the gauge form is kept, with its coefficients over the smaller side: there rounding costs less than it saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twofold.linalg.gauge import gauge_form
from twofold.linalg.metric import Metric, metric_product
from twofold.linalg.spectrum import Spectrum, smaller_side, solve_overlap
from twofold.nn.int_matrix import IntLinear, int_bytes
from twofold.nn.layers.factored import FactoredLinear
from twofold.quantize.rounding import round_matrix

GAUGE_BITS = 8  # from which the gauge form pays

IntForm = Literal["plain", "rows", "columns"]


def integer_form(form: str, bits: int, out_features: int, in_features: int) -> IntForm:
    """The form in which factors of so many bits are stored, for a recipe's form."""
    if form == "plain" or bits < GAUGE_BITS:
        return "plain"
    return smaller_side(out_features, in_features)


def factor_shapes(
    form: str, out_features: int, in_features: int, rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:  # of reduce and of expand, (rows, columns)
    """The shapes of the two stored matrices."""
    inner = in_features - rank if form == "columns" else in_features
    outer = out_features - rank if form == "rows" else out_features
    return (rank, inner), (outer, rank)


def factor_bytes(form: str, out_features: int, in_features: int, rank: int, bits: int, group: int | None) -> int:
    """What the integers of both factors take, without the order and the guard."""
    shapes = factor_shapes(form, out_features, in_features, rank)
    return sum(int_bytes(rows, columns, bits, group) for rows, columns in shapes)


@dataclass(frozen=True)
class IntFactors:
    """Two factors in integers."""

    form: IntForm
    reduce: IntLinear
    expand: IntLinear
    order: Tensor | None  # of a gauge form
    lifted: Tensor  # M A (k, r), with A the factor over the smaller side as it was rounded, in the working precision
    overlap: Tensor  # Aᵀ M A (r, r)
    outer: Tensor  # (r, p), the best other factor for A, before it was rounded

    def layer(self, bias: Tensor | None, transposed: bool, dtype: torch.dtype) -> FactoredLinear:
        """The layer that holds them; ``dtype`` is that of the bias and of the guard."""
        rank, columns = self.reduce.rows, self.reduce.columns
        n = columns + rank if self.form == "columns" else columns
        m = self.expand.rows + rank if self.form == "rows" else self.expand.rows
        device = self.lifted.device
        layer = FactoredLinear(n, m, rank, self.form, bias is not None, transposed, "meta", dtype)
        layer.hold_integers(self.reduce.bits, self.reduce.group, reduce=self.reduce, expand=self.expand)
        layer.weight = torch.zeros(1, device=device, dtype=dtype)
        if self.order is not None:
            layer.order = self.order.to(device)
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.detach().to(device, dtype, copy=True))
        return layer


def integer_factors(
    weight: Tensor,  # (m, n)
    spectrum: Spectrum,
    metric: Metric,  # over the k directions of the smaller side
    rank: int,
    form: IntForm,
    bits: int,
    group: int | None,
) -> IntFactors | None:
    """The factors of a rank in integers; None where the gauge form has no bounded coefficients."""
    dtype = spectrum.values.dtype
    wide = weight.to(dtype) if spectrum.side == "rows" else weight.to(dtype).T  # (k, p)
    basis = spectrum.basis[:, :rank].to(dtype)
    order: Tensor | None = None
    if form == "plain":
        mixed = (basis * spectrum.values[:rank].clamp_min(0).sqrt().sqrt()) @ rotation(rank, basis)
        first = round_matrix(mixed if spectrum.side == "rows" else mixed.T, bits, group, IntLinear)
        near = first.weight.to(dtype)
        near = near if spectrum.side == "rows" else near.T
    else:
        stand_in = basis.new_ones(rank, 1)
        sides = (basis, stand_in) if spectrum.side == "rows" else (stand_in.T, basis.T)
        gauge = gauge_form(*sides, spectrum.side)
        if gauge is None:
            return None
        order = gauge.order
        coefficients = gauge.expand if spectrum.side == "rows" else gauge.reduce
        first = round_matrix(coefficients, bits, group, IntLinear)
        one = torch.eye(rank, dtype=dtype, device=basis.device)
        if spectrum.side == "rows":
            near = torch.cat([one, first.weight.to(dtype)])[order.to(basis.device).long()]
        else:
            near = torch.empty_like(basis)
            near[order.to(basis.device).long()] = torch.cat([one, first.weight.to(dtype).T])
    lifted = metric_product(metric, near)  # M A
    overlap = near.T @ lifted
    overlap = (overlap + overlap.T) / 2
    outer = solve_overlap(overlap, lifted.T @ wide)  # (r, p)
    second = round_matrix(outer if spectrum.side == "rows" else outer.T, bits, group, IntLinear)
    reduce, expand = (second, first) if spectrum.side == "rows" else (first, second)
    return IntFactors(form, reduce, expand, order, lifted, overlap, outer)


def rotation(
    rank: int,
    like: Tensor,
) -> Tensor:  # (rank, rank)
    """An orthogonal matrix, the same one for the same rank."""
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    orthogonal: Tensor = torch.linalg.qr(drawn)[0].to(like)
    return orthogonal
