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

import torch
from torch import Tensor

from twofold.linalg.gauge import gauge_form
from twofold.linalg.metric import Metric, metric_product
from twofold.linalg.spectrum import Spectrum, smaller_side, solve_semidefinite
from twofold.nn.compact import unfilled
from twofold.nn.int_matrix import IntLinear, int_bytes
from twofold.nn.layers.factored import FactoredLinear, Form, factor_shapes
from twofold.quantize.rounding import round_matrix

GAUGE_BITS = 8  # from which the gauge form pays


def integer_form(form: str, bits: int, out_features: int, in_features: int) -> Form:
    """Return the form in which factors of so many bits are stored, for a recipe's form."""
    if form == "plain" or bits < GAUGE_BITS:
        return "plain"
    return smaller_side(out_features, in_features)


def factor_bytes(form: str, out_features: int, in_features: int, rank: int, bits: int, group: int | None) -> int:
    """Count what the integers of both factors take, without the order and the guard."""
    shapes = factor_shapes(form, out_features, in_features, rank)
    return sum(int_bytes(rows, columns, bits, group) for rows, columns in shapes)


@dataclass(frozen=True)
class IntFactors:
    """Two factors in integers."""

    form: Form
    reduce: IntLinear
    expand: IntLinear
    order: Tensor | None  # of a gauge form
    lifted: Tensor  # M A (k, r), with A the factor over the smaller side as it was rounded, in the working precision
    overlap: Tensor  # Aᵀ M A (r, r)
    outer: Tensor  # (r, p), the best other factor for A, before it was rounded

    def layer(self, bias: Tensor | None, transposed: bool, dtype: torch.dtype) -> FactoredLinear:
        """Return the layer that holds them; ``dtype`` is that of the bias and of the guard."""
        rank = self.reduce.rows
        n = self.reduce.columns + (rank if self.form == "columns" else 0)
        m = self.expand.rows + (rank if self.form == "rows" else 0)
        layer = FactoredLinear(n, m, rank, self.form, **unfilled(bias, transposed, dtype))
        layer.fill(self.lifted.device, bias=bias, order=self.order)
        layer.hold_integers(self.reduce.bits, self.reduce.group, reduce=self.reduce, expand=self.expand)
        return layer


def integer_factors(
    weight: Tensor,  # (m, n)
    spectrum: Spectrum,
    metric: Metric,  # over the k directions of the smaller side
    rank: int,
    form: Form,
    bits: int,
    group: int | None,
) -> IntFactors | None:
    """Return the factors of a rank in integers; None where the gauge form has no bounded coefficients."""
    dtype, rows = spectrum.values.dtype, spectrum.side == "rows"

    def turned(matrix: Tensor) -> Tensor:
        return matrix if rows else matrix.T

    basis = spectrum.basis[:, :rank].to(dtype)
    order: Tensor | None = None
    if form == "plain":
        mixed = (basis * spectrum.values[:rank].clamp_min(0).sqrt().sqrt()) @ rotation(rank, basis)
        first = round_matrix(turned(mixed), bits, group, IntLinear)
        near = turned(first.weight.to(dtype))
    else:
        stand_in = basis.new_ones(rank, 1)
        sides = (basis, stand_in) if rows else (stand_in.T, basis.T)
        gauge = gauge_form(*sides, spectrum.side)
        if gauge is None:
            return None
        order = gauge.order
        first = round_matrix(gauge.expand if rows else gauge.reduce, bits, group, IntLinear)
        identity = torch.eye(rank, dtype=dtype, device=basis.device)
        places = (order if rows else order.argsort()).to(basis.device).long()
        near = torch.cat([identity, turned(first.weight.to(dtype))])[places]
    lifted = metric_product(metric, near)  # M A
    overlap = near.T @ lifted
    overlap = (overlap + overlap.T) / 2
    outer = solve_semidefinite(overlap, lifted.T @ turned(weight.to(dtype)))  # (r, p)
    second = round_matrix(turned(outer), bits, group, IntLinear)
    reduce, expand = (second, first) if rows else (first, second)
    return IntFactors(form, reduce, expand, order, lifted, overlap, outer)


def rotation(
    rank: int,
    like: Tensor,
) -> Tensor:  # (rank, rank)
    """Return an orthogonal matrix, the same one for the same rank."""
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    orthogonal: Tensor = torch.linalg.qr(drawn)[0].to(like)
    return orthogonal
