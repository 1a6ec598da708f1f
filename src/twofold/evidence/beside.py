"""What a page shows beside a plan: some weights' spectra in three metrics, and what integers of the dense weights would lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from twofold.decompose.decompose import Decomposition, decompose_targets
from twofold.decompose.spectra import Spectra
from twofold.host import processes
from twofold.linalg import damp, smaller_side
from twofold.model.kinds import dense_weight
from twofold.model.streamed import Resident
from twofold.model.target import Target, Targets
from twofold.nn.int_matrix import IntLinear
from twofold.objectives import OBJECTIVES, LayerMoments
from twofold.quantize.loss import error_loss, far_diagonal
from twofold.quantize.rounding import round_matrix, torchao_version
from twofold.quantize.settings import Integers

METRICS = {"plain": "svd", "inputs": "svd-llm", "both": "two-sided"}  # and the objective whose spectra are in it
WIDTHS = (8, 4)  # bits
MOST = 2e10  # multiplications of the decompositions (k³ each), some seconds
MOST_ROUNDED = 2e12  # multiplications of the measures of rounding


@dataclass(frozen=True)
class Beside:
    """Some weights' σ² (k,), largest first, by metric and weight; what all targets lose in integers, Σσ² by bits."""

    spectra: Mapping[str, Mapping[str, NDArray[np.float64]]] = field(default_factory=dict)
    rounded: Mapping[int, float] = field(default_factory=dict)


def measure_beside(residence: Resident, targets: Targets, decomposition: Decomposition, integers: Integers) -> Beside:
    """Decompose the first, the middle and the last weight of each kind in every metric that the moments are known of.

    Large models get as many as take some seconds. Streamed ones get none, nor do weights that are cut together or corrected,
    nor what many processes work on.
    """
    if residence.streamed or decomposition.objective.build is None or processes.world() > 1:
        return Beside()
    chosen = _chosen(targets.targets)
    spectra = {}
    for metric, name in METRICS.items() if chosen else ():
        if not _known(decomposition.layer(chosen[0].name), name):
            continue
        if name == decomposition.objective.name:
            values: Mapping[str, NDArray[np.float64]] = decomposition.spectra.values
        else:
            other = replace(decomposition, objective=OBJECTIVES.get(name), spectra=Spectra(None, name, bases=False))
            decompose_targets(residence, replace(targets, targets=chosen, dense=[]), other, quiet=True)
            values = other.spectra.values
        spectra[metric] = {target.name: np.asarray(values[target.name], dtype=np.float64) for target in chosen}
    return Beside(spectra, _rounded(residence.model, targets.targets, decomposition, integers))


def _chosen(targets: list[Target]) -> list[Target]:
    """Return the middle weight of each kind, then the first and the last ones, as long as there is time for them."""
    kinds: dict[tuple[str, tuple[int, int]], list[Target]] = {}
    for target in targets:
        kinds.setdefault((target.kind, target.shape), []).append(target)
    places = (lambda n: n // 2, lambda n: 0, lambda n: n - 1)
    ordered = dict.fromkeys(alike[place(len(alike))].name for place in places for alike in kinds.values())
    by_name, room, names = {target.name: target for target in targets}, MOST, set()
    for name in ordered:
        room -= float(min(by_name[name].shape)) ** 3
        if room < 0:
            break
        names.add(name)
    return [target for target in targets if target.name in names]


def _known(moments: LayerMoments, objective: str) -> bool:
    """Tell whether the moments suffice for an objective of whole metrics."""
    needs = OBJECTIVES.get(objective).needs
    inputs = moments.input is not None or moments.output is not None
    gradients = moments.gradient is not None or moments.input_gradient is not None
    return (inputs or "input" not in needs) and (gradients or "gradient" not in needs)


@torch.no_grad()
def _rounded(
    model: nn.Module, targets: list[Target], decomposition: Decomposition, integers: Integers
) -> dict[int, float]:
    """Return what the dense weights lose in integers, in the metric of both sides, if there is time to measure it."""
    size = sum(float(target.size) * min(target.shape) for target in targets)
    if decomposition.objective.name != METRICS["both"] or torchao_version() is None or size > MOST_ROUNDED:
        return {}
    lost = dict.fromkeys(WIDTHS, 0.0)
    for target in targets:
        weight = dense_weight(model.get_submodule(target.name)).detach().float()
        layer, side = decomposition.layer(target.name), smaller_side(*weight.shape)
        near, trace = layer.gradient, layer.input_trace
        if side == "columns":
            near, trace = layer.input, layer.gradient_trace
        if near is None:
            return {}
        metric = damp(near.to(weight), decomposition.damping)
        far = far_diagonal(weight, layer, decomposition.objective, decomposition.damping)
        if far is None:  # its diagonal was not collected: the mean of it, since its trace was
            far = weight.new_full((max(weight.shape),), trace / max(weight.shape) * (1 + decomposition.damping))
        for bits in WIDTHS:
            error = weight - round_matrix(weight, bits, integers.group(bits), IntLinear).weight
            lost[bits] += error_loss(error, metric, side, far)
    return lost
