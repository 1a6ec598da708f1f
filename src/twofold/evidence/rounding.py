"""What rounding each weight loses, dense and at some ranks: the evidence on which rank and bits are chosen together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from twofold.evidence.base import Measurement
from twofold.host.progress import progress
from twofold.model.target import Target
from twofold.nn.int_matrix import IntLinear
from twofold.nn.layers.factored import Form
from twofold.quantize.factors import integer_factors, integer_form
from twofold.quantize.loss import error_loss, factors_loss, far_diagonal
from twofold.quantize.rounding import round_matrix

AUTO_BITS = (2, 3, 4, 5, 6, 8)
SHARES = (0.08, 0.25, 0.7)  # of the full rank, at which factors are rounded


@dataclass(frozen=True)
class Rounding:
    """What rounding one weight loses, in the unit of its spectrum.

    ``dense`` is the loss of the whole weight at each number of bits. ``shares`` (c,) are what the factors lose by rounding at
    some ranks, ``ranks`` (c,), as a share of what those ranks keep: it changes slowly with the rank, so that others are
    interpolated.
    """

    dense: Mapping[int, float]
    ranks: NDArray[np.int64]
    shares: Mapping[int, NDArray[np.float64]]

    def added(
        self,
        bits: int,
        ranks: NDArray[np.int64],  # (r,)
        saved: NDArray[np.float64],  # (r,), the loss that these ranks save
    ) -> NDArray[np.float64]:  # (r,)
        """Return what rounding the factors of some ranks loses."""
        lost: NDArray[np.float64] = np.interp(np.log(ranks), np.log(self.ranks), self.shares[bits]) * saved
        return lost


def measure_rounding(work: Measurement) -> dict[str, Rounding]:
    """Round every weight at each number of bits, whole and in factors of some ranks, and measure what that loses."""
    losses: dict[str, Rounding] = {}
    with progress("Rounding", len(work.targets), unit="weights", quiet=work.quiet) as tick:
        for target in work.targets:
            losses[target.name] = _round(work, target)
            tick()
    return losses


@torch.no_grad()
def _round(work: Measurement, target: Target) -> Rounding:
    """Round one weight, and measure what that loses."""
    decomposition, settings = work.decomposition, work.settings
    problem, spectrum, weight = work.decomposed(target)
    weight = weight.to(problem.gram.dtype)  # (m, n)
    far = far_diagonal(weight, decomposition.layer(target.name), decomposition.objective, decomposition.damping)
    assert far is not None  # other objectives are refused before
    dense: dict[int, float] = {}
    shares: dict[int, np.ndarray] = {}
    tails = spectrum.tails.cpu().numpy()
    largest = max(min(spectrum.numerical_rank, len(tails) - 2), 1)
    ranks = np.unique([max(int(share * largest), 1) for share in SHARES])
    for bits in AUTO_BITS:
        group = settings.group(bits)
        error = weight - round_matrix(weight, bits, group, IntLinear).weight
        dense[bits] = error_loss(error, problem.metric, problem.side, far)
        forms: tuple[Form, Form] = (integer_form(settings.form, bits, *weight.shape), "plain")
        lost = []
        for rank in ranks:
            tries = (integer_factors(weight, spectrum, problem.metric, int(rank), form, bits, group) for form in forms)
            factors = next(factors for factors in tries if factors is not None)
            whole = factors_loss(factors, problem.metric, problem.side, problem.gram, far)
            saved = max(tails[0] - tails[rank], np.finfo(np.float64).tiny)
            lost.append(max(whole - tails[rank], 0.0) / saved)
        shares[bits] = np.array(lost)
    return Rounding(dense, ranks, shares)
