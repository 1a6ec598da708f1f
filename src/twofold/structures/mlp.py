"""Fewer hidden units of an MLP: ridge leverage scores choose them, and the last weight makes up for the others (Nyström).

With C = E[h hᵀ] of the hidden units h that the last weight W reads, damped by λ: the k units K with the largest scores
diag(C (C + λ)⁻¹) stay, and W becomes W C_:K C_KK⁻¹ (C damped), the least-squares estimate of all units from those. The loss is
the energy of what that misses, E‖W h − W′ h_K‖². All sizes come from one Cholesky factor L of C in the order of the scores: the
residual after k units is L_:,k: L_:,k:ᵀ. Source: MoDeGPT, type I (Lin et al., ICLR 2025, arXiv 2408.09632).
"""

from __future__ import annotations

import torch
from torch import nn

from twofold.calibrate.moments import Moments
from twofold.model.kinds import dense_weight
from twofold.model.structure import Structure
from twofold.nn.layers.sliced import SlicedLinear
from twofold.structures.weights import definite, energy, part_of, wide


class CutMLP:
    """An MLP that is ready to be cut to any number of hidden units."""

    def __init__(self, structure: Structure, model: nn.Module, moments: Moments, damping: float) -> None:
        self.structure, self.model = structure, model
        self.reader = model.get_submodule(structure.name)
        self.weight = wide(self.reader)  # (m, n)
        self.moment, factor, damping = definite(moments.layer(structure.name), damping, self.weight.device)
        ridge = damping * self.moment.diagonal().mean() / (1 + damping)
        scores = 1 - ridge * torch.cholesky_inverse(factor).diagonal()
        self.order = scores.argsort(descending=True, stable=True)
        factor = torch.linalg.cholesky(self.moment[self.order][:, self.order])
        parts = (self.weight[:, self.order] @ factor).square().sum(0)  # what each unit adds in this order
        self.losses = torch.cat([parts.flip(0).cumsum(0).flip(0), parts.new_zeros(1)])

    def layers(self, units: int, stored: torch.dtype) -> tuple[dict[str, SlicedLinear], float]:
        rest = self.order[:units].sort().values
        factor = torch.linalg.cholesky(self.moment[rest][:, rest])
        weight = torch.cholesky_solve(self.moment[rest] @ self.weight.T, factor).T  # (m, k)
        layers: dict[str, SlicedLinear] = {}
        for member in self.structure.members[:-1]:
            module = self.model.get_submodule(member.name)
            layers[member.name] = part_of(module, "kept-rows", dense_weight(module)[rest], rest, stored)
        reader = part_of(self.reader, "kept-columns", weight, rest, stored)
        loss = energy(self.weight - reader.to_dense(self.weight.dtype), self.moment)
        return {**layers, self.structure.name: reader}, loss
