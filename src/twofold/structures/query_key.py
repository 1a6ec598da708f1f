"""Fewer dimensions in each head of queries and keys: those that add most to the attention scores stay as they are (CR).

For a key head with A = Σ E[q qᵀ] over the query heads that share it and B = E[k kᵀ], biases included:
- a dimension i scores (A_ii B_ii)^½. Leaving the set D out changes the attention scores by Σ_{i,j in D} A_ij B_ij in the mean
  square, for a query and a key of tokens that have nothing to do with one another.
- with rotary embeddings a unit is the pair of dimensions p that turn together, and scores (tr A_pp tr B_pp)^½. In the mean over
  all angles the pairs do not mix, and leaving D out costs Σ_{p in D} ½ tr A_pp tr B_pp.
Every head keeps as many, each its own. Source: MoDeGPT, type II (Lin et al., ICLR 2025, arXiv 2408.09632); the sum over query
heads and the mean over angles are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twofold.calibrate.moments import Moments
from twofold.model.kinds import dense_weight
from twofold.model.structure import Structure
from twofold.nn.layers.sliced import SlicedLinear
from twofold.structures.units import unit_dims, unit_rows
from twofold.structures.weights import part_of, with_bias, with_one


class CutQueries:
    """Queries and keys that are ready to be cut to any number of dimensions, or pairs of them, in each head."""

    def __init__(self, structure: Structure, model: nn.Module, moments: Moments, damping: float) -> None:
        self.structure = structure
        self.keys, self.queries = (model.get_submodule(member.name) for member in structure.members)
        heads, shared = structure.key_heads, structure.heads // structure.key_heads
        dim = unit_dims(structure).numel()
        k = with_bias(self.keys).reshape(heads, dim, -1)  # (heads, d, n + 1)
        q = with_bias(self.queries).reshape(heads, shared, dim, -1)  # (heads, shared, d, n + 1)
        moment = with_one(moments.layer(structure.name), damping, k.device)
        losses = self._pair_losses((q @ moment @ q.mT).sum(1), k @ moment @ k.mT)  # (heads, units, units)
        scores = losses.diagonal(dim1=-2, dim2=-1)  # squared
        self.order = scores.argsort(dim=-1, descending=True, stable=True)  # (heads, units)
        heads_of = torch.arange(heads)[:, None, None]
        ordered = losses[heads_of, self.order[:, :, None], self.order[:, None, :]]
        # What is left out after k units is the block behind them.
        blocks = ordered.flip(-1, -2).cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1).flip(-1).sum(0)
        self.losses = torch.cat([blocks, blocks.new_zeros(1)])

    def _pair_losses(
        self,
        a: Tensor,  # (heads, d, d)
        b: Tensor,  # (heads, d, d)
    ) -> Tensor:  # (heads, units, units)
        """Return what leaving out two units costs together; on the diagonal, one alone."""
        if self.structure.pairing == "single":
            return a * b
        dims = unit_dims(self.structure)  # (units, 2)
        traces = [m.diagonal(dim1=-2, dim2=-1)[:, dims].sum(-1) for m in (a, b)]
        return torch.diag_embed(traces[0] * traces[1] / 2)

    def layers(self, units: int, stored: torch.dtype) -> tuple[dict[str, SlicedLinear], float]:
        s, units_of_head = self.structure, self.order[:, :units].cpu()
        layers: dict[str, SlicedLinear] = {}
        for member, module, heads in zip(s.members, (self.keys, self.queries), (s.key_heads, s.heads), strict=True):
            weight = dense_weight(module)
            rows = unit_rows(s, units_of_head, heads).to(weight.device)
            layers[member.name] = part_of(module, "kept-rows", weight[rows], rows, stored)
        return layers, float(self.losses[units])  # the rows that stay are not changed
