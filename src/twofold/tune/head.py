"""The output layer as TRL's fused head wants it: TRL multiplies by ``lm_head.weight`` itself, which ours do not have."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from twofold.nn import CompactLinear


@dataclass(frozen=True)
class DenseHead:
    """What TRL asks of an output layer."""

    weight: Tensor  # (vocabulary, width)
    bias: Tensor | None  # (vocabulary,)


def dense_head(layer: CompactLinear) -> DenseHead:
    """The weight of a factored or rounded output layer, by what it does to the identity, so that gradients reach its factors."""
    one = torch.eye(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    bias = layer.bias
    columns: Tensor = layer(one)
    return DenseHead((columns if bias is None else columns - bias).T, bias)


def fuse_compact_head(model: Any) -> None:
    """Let TRL's fused forward see a dense output layer where the model's own is one of ours; other models are left alone."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base.get_output_embeddings(), CompactLinear):
        return
    forward = base.forward

    @functools.wraps(forward)
    def with_dense_head(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, **kwargs)
        head = dense_head(base.get_output_embeddings())
        base.get_output_embeddings = lambda: head
        try:
            return forward(*args, fused_lm_head=True, **kwargs)
        finally:
            del base.get_output_embeddings

    base.forward = with_dense_head
