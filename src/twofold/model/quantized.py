"""Checkpoints that are quantized already: what says so, and how they become ordinary models when that is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from twofold.checkpoint.headers import DTYPES
from twofold.checkpoint.packed import is_packed, unpacked_tensors
from twofold.checkpoint.plugin import METHOD
from twofold.checkpoint.shards import Shards
from twofold.errors import TwofoldError
from twofold.host.faults import errors_in_words
from twofold.host.quiet import first_line, silence

FIELD = "quantization_config"


def quantization_of(config: Any) -> dict[str, Any] | None:
    """Return the settings of the quantizer, where transformers looks for them; None if there are none."""
    for part in (config, config.get_text_config(decoder=True)):
        settings = getattr(part, FIELD, None)
        if settings is not None:
            return settings if isinstance(settings, dict) else dict(settings.to_dict())
    return None


def method_of(settings: Mapping[str, Any]) -> str:
    """Return the name by which transformers knows a quantization.

    Raises:
        TwofoldError: if it knows none; it would go on with a warning, and random weights.
    """
    method = settings.get("quant_method")
    if _key(settings) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        named = (
            f"the quantization {method!r}, which transformers does not know" if method else "no method of quantization"
        )
        raise TwofoldError(
            f"the model's config.json names {named} (quant_method in {FIELD}); name the checkpoint that it was made from"
        )
    return str(method or "bitsandbytes")


def _key(settings: Mapping[str, Any]) -> Any:
    """Return the name of a method in transformers' tables: bitsandbytes goes by the flags that came before its name."""
    bits = next((f"bitsandbytes_{bits}" for bits in ("4bit", "8bit") if settings.get(f"load_in_{bits}")), None)
    return bits or settings.get("quant_method")


def quantized_by(config: Any, shards: Shards | None) -> str:
    """Say how the weights of a checkpoint are quantized, by config.json or else by the files; "" if they are not.

    Raises:
        TwofoldError: if config.json names no method that transformers knows.
    """
    settings = quantization_of(config)
    if settings is not None:
        method = method_of(settings)
        return "" if method == METHOD else f"quantized with {method}"
    packed = shards is not None and is_packed(shards.headers)
    return f"quantized, though its config.json has no {FIELD}" if packed else ""


def refuse_quantized(name: str, how: str, dequantize: bool) -> None:
    """Refuse a checkpoint that is quantized, unless it is to be dequantized.

    Raises:
        TwofoldError: saying how to go on.
    """
    if how and not dequantize:
        raise TwofoldError(
            f"the model {name} is {how}, and Twofold works on ordinary weights: give `dequantize` to turn them into such, write "
            f"them so once (twofold export {name} --to dense --dequantize --out NEW), or name the model that it was made from"
        )


def without_quantization(config: Any) -> Any:
    """Take the settings of the quantizer out of a configuration."""
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, FIELD):
            delattr(part, FIELD)
    return config


def dequantized_dtype(config: Any, shards: Shards | None) -> torch.dtype:
    """Return the dtype that dequantized weights are written in: that of config.json, or of what is not quantized."""
    named = getattr(config, "dtype", None)
    stored = [DTYPES.get(header.dtype) for header in shards.headers.values()] if shards is not None else []
    wide = [d for d in (named, *stored) if isinstance(d, torch.dtype) and d.is_floating_point and d.itemsize > 1]
    return wide[0] if wide else torch.bfloat16


def load_dequantized(
    model_class: Any, config: Any, shards: Shards, source: str | Path, name: str, how: str, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a quantized checkpoint as an ordinary model: its weights unpacked here, or else by transformers.

    Args:
        config: as it stands in the checkpoint; the settings of its quantizer are taken out.
        settings: of ``from_pretrained``.

    Returns:
        The model and what ``from_pretrained`` tells of its loading.

    Raises:
        TwofoldError: if it can't be done, naming what it lacks.
    """
    quantization = quantization_of(config) or {}
    tensors: Mapping[str, Any] | None = unpacked_tensors(shards, quantization)
    if tensors is None:

        def words(error: Exception) -> str:
            lacks = re.search(r"pip install (?:-U |--upgrade )?[`'\"]?([\w-]+)", str(error))
            remedy = f"install {lacks[1]}, or name" if lacks else "name"
            return (
                f"the model {name} is {how}, and transformers can't dequantize it here ({first_line(error)}); {remedy} the "
                "model that it was made from"
            )

        with errors_in_words(words), silence():
            tensors = _by_transformers(model_class, quantization, source, settings)
    config = without_quantization(config)
    if getattr(model_class, "config_class", None) is None:  # an Auto class takes no tensors
        model_class = model_class._model_mapping[type(config)]
    with errors_in_words(lambda error: f"the model {name}, dequantized, can't be loaded: {first_line(error)}"):
        model, report = model_class.from_pretrained(None, config=config, state_dict=tensors, **settings)
    model.config._name_or_path = str(source)
    if model.can_generate() and (Path(source) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model, report


def _by_transformers(
    model_class: Any, quantization: dict[str, Any], source: str | Path, settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Load and dequantize by the means of transformers, as far as a method has any; return the weights.

    Raises:
        ValueError: if a weight stays packed.
    """
    kind, asked = AUTO_QUANTIZATION_CONFIG_MAPPING[_key(quantization)], {}
    if "dequantize" in vars(kind.from_dict(dict(quantization))):  # while the weights are loaded
        asked = {FIELD: kind.from_dict({**quantization, "dequantize": True})}
    model, _ = model_class.from_pretrained(source, **asked, **settings)
    tensors: dict[str, Any] = model.state_dict()
    # Numbers that know themselves what they stand for, as torchao's.
    knowing = {key for key, tensor in tensors.items() if type(tensor) is not Tensor and hasattr(tensor, "dequantize")}
    if getattr(model, "hf_quantizer", None) is not None and not knowing:
        tensors = model.dequantize(settings["dtype"]).state_dict()
    tensors |= {key: tensors[key].dequantize() for key in knowing}
    packed = next((key for key, tensor in tensors.items() if tensor.dim() > 1 and not tensor.is_floating_point()), None)
    if packed is not None:
        raise ValueError(f"it leaves {packed} packed")
    return tensors
