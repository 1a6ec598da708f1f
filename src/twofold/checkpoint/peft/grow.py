"""A low-rank change added to a factored layer exactly: its rank grows, [left, L] [right; R] = left right + L R."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.errors import TwofoldError
from twofold.linalg.gauge import plain_storage
from twofold.linalg.metric import working_dtype
from twofold.nn.compact import dense_linear
from twofold.nn.int_matrix import IntMatrix
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear, in_places


@torch.no_grad()
def grow(
    layer: nn.Module,
    left: Tensor,  # (m, k)
    right: Tensor,  # (k, n)
    bias: Tensor | None = None,  # (m,), added to the layer's
) -> nn.Module:
    """Return the layer that computes (W′ + left · right) x + b + bias, of the rank r + k; the given one is left as it is.

    A layer whose rank would reach that of a full matrix, or that would take more room than one, becomes dense.

    Raises:
        TwofoldError: if its form holds no further rank, as that of a sliced layer or one that shares its basis, or its factors
            are integers.
    """
    if isinstance(layer, nn.Linear | Conv1D):  # it became dense when it grew before
        dense = copy.deepcopy(layer)
        added = left.to(dense.weight) @ right.to(dense.weight)
        dense.weight += added.T if isinstance(layer, Conv1D) else added
        if bias is not None:
            dense.bias += bias.to(dense.weight)
        return dense
    if not isinstance(layer, FactoredLinear):
        raise TwofoldError(
            f"an adapter can't be merged into a {type(layer).__name__}, whose form holds no further rank; keep it beside the "
            "model, or make the model dense first (model.dequantize())"
        )
    if any(isinstance(part, IntMatrix) for part in layer.modules()):
        raise TwofoldError(
            "an adapter can't be merged into factors that are integers (`bits`), they would become floating point; keep it "
            "beside the model, or make the model dense first (twofold export --to dense)"
        )
    if bias is not None and layer.bias is None:
        raise TwofoldError("the adapter has a bias, the layer has none; keep it beside the model")
    dtype, wide = layer.weight.dtype, working_dtype(layer.weight.device)
    left, right = left.detach().to(layer.weight.device, wide), right.detach().to(layer.weight.device, wide)
    if layer.bias is not None:
        total = layer.bias.detach().to(wide)
        bias = total if bias is None else total + bias.to(total)
    if not left.any() or not right.any():  # nothing was trained: no rank is spent on it
        left, right = left[:, :0], right[:0]
    split = None
    if isinstance(layer, DenseColumnsLinear):
        split = layer.split
        right = right.index_select(1, split)
        columns = layer.dense.weight.detach().to(wide) + left @ right[:, : layer.columns]
        right = right[:, layer.columns :]
    old_left, old_right = layer.factors(wide)
    left, right = torch.cat([old_left, left], 1), torch.cat([old_right, right])
    (m, r), n = left.shape, right.shape[1]
    if r < min(m, n):
        inner = bias if split is None else None
        grown = FactoredLinear.from_factors(left, right, inner, transposed=layer.transposed, dtype=dtype)
        if grown.form != "plain" or plain_storage(m, n, r) < m * n:
            if split is None:
                return grown
            outer = None if bias is None else bias.to(dtype)
            return DenseColumnsLinear.around(grown, columns.to(dtype), split, outer, layer.transposed)
    weight = left @ right
    if split is not None:
        weight = in_places(torch.cat([columns, weight], 1), split)
    return dense_linear(weight.to(dtype), bias, layer.transposed)
