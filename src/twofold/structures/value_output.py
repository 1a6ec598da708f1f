"""Fewer dimensions in each head of the values: the joint decomposition of values and output.

For a key head with the values V z (d, n + 1), z = (x, 1), and the columns O_q (m, d) of the query heads q that share it: with
S = V E[z zᵀ] Vᵀ and T = Σ_q O_qᵀ O_q, the best r dimensions solve min tr(T (1 − P) S (1 − P)ᵀ). With
P = A R, V becomes R V (r, n + 1) and O_q becomes O_q A. Every head keeps the same r. The loss is Σ_q E‖O_q (1 − P) V z‖², as if
each query head attended to one token. Source: MoDeGPT, type III (Lin et al., ICLR 2025, arXiv 2408.09632); there without
sharing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twofold.calibrate.moments import Moments
from twofold.linalg.spectrum import spectrum_of, truncate
from twofold.model.structure import Structure
from twofold.nn.layers.sliced import SlicedLinear
from twofold.structures.units import unit_rows
from twofold.structures.weights import part_of, wide, with_bias, with_one


class CutValues:
    """Values and output that are ready to be cut to any number of dimensions in each head."""

    def __init__(self, structure: Structure, model: nn.Module, moments: Moments, damping: float) -> None:
        self.structure = structure
        self.values, self.output = (model.get_submodule(member.name) for member in structure.members)
        heads, shared, dim = structure.key_heads, structure.heads // structure.key_heads, structure.units
        self.v = with_bias(self.values).reshape(heads, dim, -1)  # (heads, d, n + 1)
        self.o = wide(self.output).reshape(-1, heads, shared, dim)  # (m, heads, shared, d)
        self.moment = with_one(moments.layer(structure.members[0].name), damping, self.v.device)
        self.metric = torch.einsum("mhsd,mhse->hde", self.o, self.o)
        self.spectrum = spectrum_of(self.metric, self.v @ self.moment @ self.v.mT, "rows")
        self.losses = self.spectrum.tails.sum(0)

    def layers(self, units: int, stored: torch.dtype) -> tuple[dict[str, SlicedLinear], float]:
        s, (v, o) = self.structure, self.structure.members
        pairs = [truncate(head, self.spectrum[i], self.metric[i], units) for i, head in enumerate(self.v)]
        basis = torch.stack([left for left, _ in pairs])  # A (heads, d, r)
        rows = torch.cat([right for _, right in pairs])  # R V (heads · r, n + 1)
        columns = torch.einsum("mhsd,hdr->mhsr", self.o, basis).flatten(1)  # (m, query heads · r)
        first = torch.arange(units).expand(s.key_heads, -1)
        index = unit_rows(s, first, s.key_heads).to(rows.device)
        bias = None
        if self.values.bias is not None:
            bias = rows.new_zeros(s.key_heads * s.units).index_copy(0, index, rows[:, -1])
        values = part_of(self.values, "kept-rows", rows[:, :-1], index, stored, bias)
        places = unit_rows(s, first, s.heads).to(rows.device)
        output = part_of(self.output, "kept-columns", columns, places, stored)
        return {v.name: values, o.name: output}, self._loss(values, output)

    def _loss(self, values: SlicedLinear, output: SlicedLinear) -> float:
        """Return the loss of what the layers store: the difference of two products is one product of twice the width."""
        both = torch.cat([self.v, with_bias(values).reshape(self.v.shape)], 1)  # (heads, 2d, n + 1)
        dense = wide(output).reshape(self.o.shape)
        outputs = torch.cat([self.o, -dense], -1)  # (m, heads, shared, 2d)
        metric: Tensor = torch.einsum("mhsd,mhse->hde", outputs, outputs)
        return max(float((metric * (both @ self.moment @ both.mT)).sum()), 0.0)
