"""One basis for the inputs of several blocks: the truncated decomposition of their stacked weights in the metric of all inputs.

With W = [W_1; …; W_k] (Σm, n) and C = Σ_i E[x_i x_iᵀ] (damped), W C^½ = U Σ Vᵀ gives W_i ≈ E_i B with one B (r, n) and an E_i
(m, r) for each block, at the loss Σ_{i>r} σ_i². C is divided by the number of inputs that were summed: that changes no basis, and
the losses of bases for any number of blocks are on one scale. Source: Basis Sharing (Wang et al., ICLR 2025, arXiv 2410.03765).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.calibrate.moments import Moments
from twofold.errors import TwofoldError
from twofold.linalg.gauge import gauge_storage
from twofold.linalg.metric import damp
from twofold.linalg.spectrum import gram, smaller_side, spectrum_of, truncate
from twofold.model.kinds import dense_weight
from twofold.model.structure import Structure
from twofold.nn.compact import CompactLinear
from twofold.nn.layers._basis import SharedBasis
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.shared import SharedLinear
from twofold.structures.weights import energy, settle, wide, working


class CutShared:
    """Weights of several blocks that are ready to get a basis of any rank; one that is alone gets two factors, as any."""

    def __init__(self, structure: Structure, model: nn.Module, moments: Moments, damping: float) -> None:
        self.structure = structure
        self.modules = {member.name: model.get_submodule(member.name) for member in structure.members}
        self.weight = torch.cat([wide(module) for module in self.modules.values()])  # (Σm, n)
        summed = all_inputs(moments, list(self.modules)).to(self.weight.device)
        self.moment = damp(working(summed), damping)  # (n, n)
        self.gauge = structure.members[0].form in ("gauge", "shared-columns")
        if not (torch.isfinite(self.weight).all() and torch.isfinite(self.moment).all()):
            raise TwofoldError(f"the weights or the moments of {structure.name} hold NaN or infinity")
        side = smaller_side(*self.weight.shape)
        self.metric = self.moment if side == "columns" else None
        far = self.moment if side == "rows" else None
        self.spectrum = spectrum_of(self.metric, gram(self.weight, far), side, torch.finfo(summed.dtype).eps)
        self.losses = self.spectrum.tails

    def layers(self, units: int, stored: torch.dtype) -> tuple[Mapping[str, CompactLinear], float]:
        layers = self._layers(units, stored, "auto" if self.gauge else "plain")
        if self.gauge and any(layer.form in ("plain", "shared-plain") for layer in layers.values()):
            # No bounded coefficients: the same storage takes a smaller rank.
            rows, n = self.weight.shape
            layers = self._layers(max(gauge_storage(rows, n, units) // (rows + n), 1), stored, "plain")
        for name, layer in layers.items():
            settle(layer, self.modules[name])
            if isinstance(layer, SharedLinear):
                settle(layer.basis, self.modules[name])
        dense = torch.cat([layer.to_dense(self.weight.dtype) for layer in layers.values()])
        return layers, energy(self.weight - dense, self.moment)

    def _layers(self, rank: int, stored: torch.dtype, form: Literal["auto", "plain"]) -> dict[str, CompactLinear]:
        """Return the layers of one rank, in the dtype that is stored."""
        left, right = truncate(self.weight, self.spectrum, self.metric, rank)
        places = {name: (getattr(m, "bias", None), isinstance(m, Conv1D)) for name, m in self.modules.items()}
        if self.structure.basis is None:
            ((name, (bias, transposed)),) = places.items()
            return {name: FactoredLinear.from_factors(left, right, bias, form, transposed, dtype=stored)}
        basis, left = SharedBasis.from_factors(self.structure.basis, left, right, form, stored)
        own = torch.split(left, [len(dense_weight(module)) for module in self.modules.values()])
        return {
            name: SharedLinear.on(basis, expand, bias, transposed)
            for (name, (bias, transposed)), expand in zip(places.items(), own, strict=True)
        }


def all_inputs(
    moments: Moments,
    names: list[str],
) -> Tensor:  # (n, n)
    """Return the mean of x xᵀ over all inputs x that any of the layers was given."""
    total = sum(moments.rows(name) for name in names)
    parts = []
    for name in names:
        moment = moments.layer(name).input
        assert moment is not None
        parts.append(moment * (moments.rows(name) / total))
    return torch.stack(parts).sum(0)
