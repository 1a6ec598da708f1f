"""Training some singular directions of a factored layer alone: its product is split into what stays and what is trained.

W′ = U Σ Vᵀ of rank r. The k leading (or trailing) directions become the start of a LoRA of rank k, and the others the base layer
of rank r − k; merged after the training, the layer has the rank r again. With the leading ones this is PiSSA (Meng et al., 2024),
with the trailing ones MiLoRA (Wang et al., 2024), without a dense weight.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import replace_module


@torch.no_grad()
def split_directions(model: Any, names: list[str], count: int, *, leading: bool) -> PeftModel:
    """Make ``count`` directions of each layer a trainable adapter; at the start the model computes what it did.

    A layer of rank ``count`` or less keeps one direction as it is.

    Raises:
        TwofoldError: if no layer has two directions.
    """
    trained: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, FactoredLinear) or isinstance(layer, DenseColumnsLinear) or layer.rank < 2:
            continue
        left, values, right = product_svd(*layer.factors())
        k = min(count, len(values) - 1)
        order = torch.arange(len(values), device=values.device)
        moved, others = (order[:k], order[k:]) if leading else (order[-k:], order[:-k])
        root = values[moved].sqrt()
        trained[name] = (left[:, moved] * root, root[:, None] * right[moved])
        rest = (left[:, others] * values[others], right[others], layer.bias)
        base = FactoredLinear.from_factors(*rest, transposed=layer.transposed, dtype=layer.weight.dtype)
        replace_module(model, name, base)
    if not trained:
        raise TwofoldError(
            "no factored layer of this model has two directions, so none can be trained alone; take `method=factors`"
        )
    ranks = {name: len(down) for name, (_, down) in trained.items() if len(down) != count}
    config = LoraConfig(
        r=count, lora_alpha=count, target_modules=list(trained), task_type="CAUSAL_LM",
        rank_pattern=ranks, alpha_pattern=dict(ranks),
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    for name, (up, down) in trained.items():
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight.copy_(down)
        layer.lora_B["default"].weight.copy_(up)
    return adapted


def product_svd(
    left: Tensor,  # (m, r)
    right: Tensor,  # (r, n)
) -> tuple[Tensor, Tensor, Tensor]:  # (m, k), (k,), (k, n), k = min(m, r, n)
    """Compute the singular value decomposition of a product by decompositions of its factors: never one of (m, n)."""
    q, r = torch.linalg.qr(left)
    p, s = torch.linalg.qr(right.mT)
    u, values, v = torch.linalg.svd(r @ s.mT, full_matrices=False)
    return q @ u, values, v @ p.mT
