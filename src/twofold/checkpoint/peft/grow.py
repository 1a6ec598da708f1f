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
from twofold.nn.layers.factored import FactoredLinear


@torch.no_grad()
def grow(
    layer: nn.Module,
    left: Tensor,  # (m, k)
    right: Tensor,  # (k, n)
    bias: Tensor | None = None,  # (m,), added to the layer's
) -> nn.Module:
    """The layer that computes (W′ + left · right) x + b + bias, of the rank r + k; the given one is left as it is.

    A layer whose rank would reach that of a full matrix, or that would take more room than one, becomes dense.

    Raises:
        TwofoldError: if it is a sliced layer, or one that shares its basis: their forms hold no further rank; or if its factors
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
    total = None if layer.bias is None else layer.bias.detach().to(wide)
    if total is not None and bias is not None:
        total = total + bias.to(total)
    if not left.any() or not right.any():  # nothing was trained: no rank is spent on it
        left, right = left[:, :0], right[:0]
    split = None
    if isinstance(layer, DenseColumnsLinear):
        split = layer.split
        right = right.index_select(1, split)
        columns = layer.dense.weight.detach().to(wide) + left @ right[:, : layer.columns]
        right = right[:, layer.columns :]
    old_left, old_right = layer.factors(wide)
    whole_left, whole_right = torch.cat([old_left, left], 1), torch.cat([old_right, right])
    m, r = whole_left.shape
    n = whole_right.shape[1]
    if r < min(m, n):
        inner = None if split is not None else total
        grown = FactoredLinear.from_factors(whole_left, whole_right, inner, transposed=layer.transposed, dtype=dtype)
        if grown.form != "plain" or plain_storage(m, n, r) < m * n:
            if split is None:
                return grown
            return DenseColumnsLinear.around(
                grown, columns.to(dtype), split, None if total is None else total.to(dtype), layer.transposed
            )
    weight = whole_left @ whole_right
    if split is not None:
        whole = weight.new_empty(m, layer.in_features)
        whole[:, split.long()] = torch.cat([columns, weight], 1)
        weight = whole
    return dense_linear(weight.to(dtype), total, layer.transposed)
