"""Layers of integers in a checkpoint: empty ones made from what config.json says, and what was loaded into them checked."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from twofold.errors import TwofoldError
from twofold.nn.int_matrix import IntMatrix
from twofold.nn.quantized_embedding import QuantizedEmbedding, TiedLinear
from twofold.nn.quantized_linear import CorrectedLinear, QuantizedLinear


def integers_of(settings: Mapping[str, Any]) -> tuple[int, int | None]:
    """The bits and the group that the settings of a layer name.

    Raises:
        TypeError: if they are no numbers.
    """
    bits, group = settings.get("bits"), settings.get("group")
    if type(bits) is not int or (group is not None and type(group) is not int):
        raise TypeError(f"bits must be a whole number, and group one or null, got {reprlib.repr((bits, group))}")
    return bits, group


def integer_layer(
    module: nn.Module, settings: Any, model: nn.Module
) -> QuantizedLinear | QuantizedEmbedding | TiedLinear | None:
    """An empty layer in the place of a dense one, on its device; None if the settings are of a layer that may be of either kind.

    Args:
        model: whose input embedding an output layer may share.

    Raises:
        TypeError: if the settings lack a number, or say what there is not.
        ValueError: if they do not fit the layer.
    """
    form = settings.get("form") if isinstance(settings, dict) else None
    if form not in ("dense", "corrected", "embedding", "tied"):
        return None
    known = {"form"} if form == "tied" else {"form", "bits", "group"} | ({"rank"} if form == "corrected" else set())
    if settings.keys() - known:
        raise TypeError(f"a layer in the form {form} has {', '.join(sorted(known))}, got {reprlib.repr(settings)}")
    weight: Any = getattr(module, "weight", None)
    place: dict[str, Any] = {"device": getattr(weight, "device", None), "dtype": getattr(weight, "dtype", None)}
    if form == "embedding":
        if type(module) is not nn.Embedding:
            raise ValueError(f"it is no embedding but a {type(module).__name__}")
        count, width = weight.shape
        bits, group = integers_of(settings)
        return QuantizedEmbedding(count, width, bits, group, module.padding_idx, **place)
    if type(module) is not nn.Linear and not isinstance(module, Conv1D):
        raise ValueError(f"it is no linear layer but a {type(module).__name__}")
    if form == "tied":
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(table, QuantizedEmbedding) or module.bias is not None:
            raise ValueError("it shares the table of an input embedding that is not of integers, or has a bias")
        return TiedLinear(table, **place)
    turned = isinstance(module, Conv1D)
    first, second = weight.shape
    out_features, in_features = (second, first) if turned else (first, second)
    bits, group = integers_of(settings)
    kept: dict[str, Any] = {"bias": module.bias is not None, "transposed": turned, **place}
    if form == "dense":
        return QuantizedLinear(in_features, out_features, bits, group, **kept)
    if type(settings.get("rank")) is not int:
        raise TypeError(f"a correction must have a whole number as its rank, got {reprlib.repr(settings)}")
    return CorrectedLinear(in_features, out_features, bits, group, **kept, rank=settings["rank"])


def mind_ties(model: Any) -> None:
    """Let transformers tie the parameters that there are: an output layer that shares a table of integers has none to tie."""
    if not hasattr(model, "get_expanded_tied_weights_keys"):
        return
    ours = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, TiedLinear)}
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.all_tied_weights_keys = {key: source for key, source in ties.items() if key not in ours}
    if not ours:
        model.tie_weights()


def check_loaded(rounded: Mapping[str, IntMatrix]) -> None:
    """Refuse integers of another shape than config.json says, scales that are no numbers, and what was not in the checkpoint.

    Raises:
        TwofoldError: naming the first one.
    """
    for name, matrix in rounded.items():
        wrong = matrix.index_error()
        if wrong is not None:
            raise TwofoldError(f"{name}.{wrong}; fetch the checkpoint again")
    buffers = {f"{name}.{leaf}": buffer for name, matrix in rounded.items() for leaf, buffer in matrix.named_buffers()}
    # Loaded tensors carry this mark; those that transformers filled in do not.
    loaded = {name: bool(getattr(b, "_is_hf_initialized", False)) for name, b in buffers.items() if not b.is_meta}
    absent = [name for name, found in loaded.items() if not found]
    if absent and len(absent) < len(loaded):
        raise TwofoldError(
            f"the checkpoint is not whole: it lacks {len(absent)} parts of its integers, first {absent[0]}; fetch it again"
        )
