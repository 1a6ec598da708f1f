"""The product of an input with all shards of a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from twofold.nn.layers.factored import ordered
from twofold.vllm_plugin.stores import Stores


def merged_product(
    x: Tensor,  # (..., n)
    layer: nn.Module,
    stores: Stores,
    bias: Tensor | None = None,  # (Σ m,)
) -> Tensor:  # (..., Σ m)
    """y = [W′₁; W′₂; …] x + b, each W′ as ``FactoredLinear`` has it.

    The right factors of the shards that take the input as it comes lie one below another in memory, and are one product.
    """
    shards = stores.shards
    reduce, expand = layer.reduce.weight, layer.expand.weight  # type: ignore[union-attr]
    together = [i for i, shard in enumerate(shards) if shard.reads_input]
    inner: dict[int, Tensor] = {}
    if together:
        ranks, n = [shards[i].rank for i in together], x.shape[-1]
        right = reduce.narrow(0, 0, sum(ranks) * n).view(-1, n)  # type: ignore[operator]
        inner = dict(zip(together, torch.split(linear(x, right), ranks, -1), strict=True))
    pieces: list[Tensor] = []
    for i, shard in enumerate(shards):
        if not shard.rank:
            pieces.append(linear(x, stores.weight.view(layer.weight, i)))  # type: ignore[arg-type]
            continue
        left = stores.expand.view(expand, i)  # type: ignore[arg-type]
        if shard.form == "columns":
            x_ordered = ordered(x, stores.order.view(layer.order, i))  # type: ignore[arg-type]
            kept, rest = x_ordered[..., : shard.rank], x_ordered[..., shard.rank :]
            pieces.append(linear(kept + linear(rest, stores.reduce.view(reduce, i)), left))  # type: ignore[arg-type]
            continue
        y = linear(inner[i], left)
        if shard.form == "rows":
            y = ordered(torch.cat([inner[i], y], -1), stores.order.view(layer.order, i))  # type: ignore[arg-type]
        pieces.append(y)
    y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
    return y if bias is None else y + bias
