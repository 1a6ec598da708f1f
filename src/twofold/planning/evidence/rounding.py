"""What rounding each weight loses, dense and at some ranks: the evidence on which rank and bits are chosen together."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from twofold.calibrate.moments import Moments
from twofold.decompose.spectra import Spectra
from twofold.host.progress import progress
from twofold.linalg.spectrum import Spectrum
from twofold.model.weights import Target, dense_weight
from twofold.nn.int_matrix import IntLinear
from twofold.objectives.base import LayerMoments, Objective, Problem
from twofold.planning.bits import AUTO_BITS, Rounding
from twofold.quantize.factors import integer_factors, integer_form
from twofold.quantize.loss import error_loss, factors_loss, far_diagonal
from twofold.quantize.rounding import round_matrix
from twofold.settings.recipe import Recipe

SHARES = (0.08, 0.25, 0.7)  # of the full rank, at which factors are rounded


def measure_rounding(
    model: nn.Module,
    targets: list[Target],
    spectra: Spectra,
    moments: Moments | None,
    objective: Objective,
    recipe: Recipe,
    *,
    quiet: bool = False,
) -> dict[str, Rounding]:
    """Round every weight at each number of bits, whole and in factors of some ranks, and measure what that loses."""
    from twofold.decompose.decompose import layer_problem

    found: dict[str, Rounding] = {}
    with progress("Rounding", len(targets), unit="weights", quiet=quiet) as tick:
        for target in targets:
            problem = layer_problem(model, target, moments, objective, recipe.damping)
            spectrum = spectra.get(target, problem.gram.dtype, problem.gram.device)
            weight = dense_weight(model.get_submodule(target.name)).detach().to(problem.gram.dtype)
            layer = moments.layer(target.name) if moments is not None else LayerMoments()
            far = far_diagonal(weight, layer, objective, recipe.damping)
            assert far is not None  # other objectives are refused before
            found[target.name] = _round(weight, spectrum, problem, far, recipe)
            tick()
    return found


@torch.no_grad()
def _round(
    weight: torch.Tensor,  # (m, n)
    spectrum: Spectrum,
    problem: Problem,
    far: torch.Tensor,  # (p,)
    recipe: Recipe,
) -> Rounding:
    """The same for one weight."""
    dense: dict[int, float] = {}
    shares: dict[int, np.ndarray] = {}
    tails = spectrum.tails.cpu().numpy()
    largest = max(min(spectrum.numerical_rank, len(tails) - 2), 1)
    ranks = np.unique([max(int(share * largest), 1) for share in SHARES])
    for bits in AUTO_BITS:
        group = recipe.group(bits)
        error = weight - round_matrix(weight, bits, group, IntLinear).weight
        dense[bits] = error_loss(error, problem.metric, problem.side, far)
        form = integer_form(recipe.form, bits, *weight.shape)
        lost = []
        for rank in ranks:
            made = integer_factors(weight, spectrum, problem.metric, int(rank), form, bits, group)
            made = made or integer_factors(weight, spectrum, problem.metric, int(rank), "plain", bits, group)
            assert made is not None
            whole = factors_loss(made, problem.metric, problem.side, problem.gram, far)
            kept = max(tails[0] - tails[rank], np.finfo(np.float64).tiny)
            lost.append(max(whole - tails[rank], 0.0) / kept)
        shares[bits] = np.array(lost)
    return Rounding(dense, ranks, shares)
