"""The layers of a factored model by shape, dense against factored."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from twofold.inference.latency import DECODE, PREFILL, time_shape
from twofold.model.load import load_skeleton
from twofold.nn.layers.factored import FactoredLinear
from twofold.speed.record import Layer
from twofold.speed.runtimes import RUNTIMES, Settings


def layer_table(name: str, settings: Settings, dtype: torch.dtype, device: torch.device) -> list[Layer]:
    """Time each shape of a factored model's layers at their middle rank, dense and factored, for one token and for many."""
    if name.endswith(".gguf") or RUNTIMES.get("eager").why_not(name, settings) is not None:
        return []
    model = load_skeleton(name, trust_remote_code=settings.trust_remote_code).model
    shapes: dict[tuple[int, int], list[int]] = {}
    for module in model.modules():
        if type(module) is FactoredLinear and module.bits is None:
            shapes.setdefault((module.out_features, module.in_features), []).append(module.rank)
    rows = []
    for (m, n), ranks in shapes.items():
        rank = statistics.median_low(ranks)
        shape: dict[str, Any] = {"out_features": m, "in_features": n, "layers": len(ranks), "rank": rank}
        for tokens in (DECODE, PREFILL):
            times = time_shape(m, n, [rank], tokens, dtype=dtype, device=device)
            rows.append(Layer(model=name, **shape, tokens=tokens, dense=times.dense, factored=times.factored[0]))
    return rows
