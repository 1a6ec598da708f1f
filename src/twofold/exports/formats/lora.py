"""A LoRA adapter of the residual, W′ − W of every factored layer: the original with it computes what the factored model does.

It is for programs that know adapters and nothing else. Nothing is saved by it: they hold the original whole, and the adapter
beside it. The truncation of a projection leaves W′ − W with a rank of min(m, n) − r, so an exact adapter is large where r is
small.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.errors import TwofoldError
from twofold.exports.decoding import ModelDecoder
from twofold.exports.formats import Source, Written, export_format
from twofold.exports.layers import compact_layers, recorded_original
from twofold.linalg.metric import working_dtype
from twofold.nn.compact import CompactLinear
from twofold.nn.layers._basis import SharedBasis
from twofold.nn.places import cast_weights
from twofold.task.causal_lm import writes_text


@dataclass(frozen=True)
class Residual:
    """The part of a difference that an adapter takes: B A with B (m, r), A (r, n)."""

    up: Tensor  # (m, r)
    down: Tensor  # (r, n)
    full: int  # the rank that it has up to rounding
    left: float  # share of its squared norm that is left out


@export_format("lora", factored=True, needs=("peft",), takes=("rank", "base"), original=True)
def write_lora(source: Source, folder: Path) -> Written:
    """Write an adapter of the rank that each layer takes, or of ``rank`` at the most.

    Raises:
        TwofoldError: if there is no original to be found, or it is not the one that the model was made from.
    """
    from peft import PeftModel

    name = source.base or recorded_original(source.loaded)
    original = source.read(name).model
    layers = compact_layers(source.model)
    _check_original(source, original, layers, name)
    eps, wide = torch.finfo(source.loaded.stored_dtype).eps, working_dtype(torch.device("cpu"))
    residuals: dict[str, Residual] = {}
    for key, layer in layers.items():
        residual = split(layer.to_dense(wide), _dense(original.get_submodule(key)).to(wide), source.rank, eps)
        if residual is not None:
            residuals[key] = residual
    if not residuals:
        raise TwofoldError(
            f"{source.loaded.name} computes the same as {name}: there is no residual to make an adapter of"
        )
    adapted = _adapt(original, residuals, name)
    cast_weights(adapted, source.dtype)
    adapted.save_pretrained(str(folder))
    return Written(
        lambda: ModelDecoder(PeftModel.from_pretrained(source.read(name).model, str(folder)).eval()),
        _notes(name, residuals, source.rank),
    )


def split(
    factored: Tensor,  # (m, n)
    dense: Tensor,  # (m, n)
    rank: int | None,
    eps: float,
) -> Residual | None:
    """Take the difference of two weights as a product, without what the rounding of the stored numbers explains.

    Args:
        rank: at the most; None for all that is above rounding.
        eps: of the stored dtype. Singular values below eps times the largest one of the weight are rounding.

    Returns:
        None if nothing is above rounding.
    """
    u, s, vh = torch.linalg.svd(factored - dense, full_matrices=False)
    full = int((s > eps * torch.linalg.matrix_norm(factored, 2)).sum())
    size = full if rank is None else min(full, rank)
    if not size:
        return None
    root = s[:size].sqrt()
    left = float(s[size:].square().sum() / s.square().sum())
    return Residual(u[:, :size] * root, root[:, None] * vh[:size], full, left)


def _adapt(model: Any, residuals: dict[str, Residual], name: str) -> Any:
    """Put the adapter on the original."""
    from peft import LoraConfig, get_peft_model

    ranks = {key: residual.down.shape[0] for key, residual in residuals.items()}
    most = max(ranks.values())
    transposed = {isinstance(model.get_submodule(key), Conv1D) for key in residuals}
    if len(transposed) > 1:
        raise TwofoldError(f"{name} has weights of both orders, which one adapter can't have; use `to=dense`")
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(residuals),
        fan_in_fan_out=transposed.pop(),
        task_type="CAUSAL_LM" if writes_text(model) else None,
    )
    adapted: Any = get_peft_model(model, config).eval()
    adapted.peft_config["default"].base_model_name_or_path = name
    for key, residual in residuals.items():
        layer = adapted.base_model.model.get_submodule(key)
        layer.lora_A["default"].weight.copy_(residual.down)
        layer.lora_B["default"].weight.copy_(residual.up)
    return adapted


def _dense(module: nn.Module) -> Tensor:  # (m, n)
    weight: Tensor = module.weight.detach()  # type: ignore[assignment, operator]
    return weight.T if isinstance(module, Conv1D) else weight


def _check_original(source: Source, original: Any, layers: dict[str, CompactLinear], name: str) -> None:
    """Refuse another model than the one that the factored one was made from: an adapter holds only products."""
    bases = [key for key, module in source.model.named_modules() if isinstance(module, SharedBasis)]
    inside = tuple(f"{key}." for key in [*layers, *bases])
    theirs = original.state_dict()
    mine = {key: value for key, value in source.model.state_dict().items() if not key.startswith(inside)}
    mine |= {f"{key}.bias": layer.bias for key, layer in layers.items() if layer.bias is not None}
    for key, value in mine.items():
        other = theirs.get(key)
        if other is None or other.shape != value.shape or not torch.equal(other.to(value.dtype), value):
            raise TwofoldError(
                f"{key} of {source.loaded.name} is not that of {name}, and an adapter holds differences of factored "
                "weights alone; name the original with `base`, or use `to=dense`"
            )
    for key, layer in layers.items():
        shape = (layer.out_features, layer.in_features)
        if f"{key}.weight" not in theirs or _dense(original.get_submodule(key)).shape != shape:
            raise TwofoldError(f"{name} has no weight of the shape of {key}; name the original with `base`")


def _notes(name: str, residuals: dict[str, Residual], rank: int | None) -> list[str]:
    full = [residual.full for residual in residuals.values()]
    notes = [
        f"An adapter for {name}: the two together compute what the factored model does. Nothing is saved by it, since the "
        "original is held whole beside it.",
        f"An exact adapter has a rank of {min(full)} to {max(full)} here.",
    ]
    if rank is not None and rank < max(full):
        left = max(residual.left for residual in residuals.values())
        notes.append(
            f"This one is of rank {rank} at the most, and so an approximation: up to {left:.0%} of the squared difference of a "
            "weight is left out."
        )
    return notes
