"""Checkpoints that are quantized already: what says so, and how they become ordinary models when that is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from twofold.checkpoint.headers import DTYPES
from twofold.checkpoint.packed import FLOAT8, Unpacked, is_packed, unpacked_tensors
from twofold.checkpoint.plugin import METHOD
from twofold.checkpoint.shards import Shards
from twofold.errors import TwofoldError
from twofold.host.faults import errors_in_words
from twofold.host.quiet import first_line, silence
from twofold.model.skeleton import model_on_meta
from twofold.model.stored import BY_RULE, COMPUTED, check_wrapped, find_stored

FIELD = "quantization_config"


def quantization_of(config: Any) -> dict[str, Any] | None:
    """Return the settings of the quantizer, where transformers looks for them; None if there are none."""
    for part in (config, config.get_text_config(decoder=True)):
        settings = getattr(part, FIELD, None)
        if settings is not None:
            return settings if isinstance(settings, dict) else dict(settings.to_dict())
    return None


def _unknown(settings: Mapping[str, Any]) -> str:
    """Say what is wrong with the name of a method; "" if transformers knows it.

    Transformers goes on with a warning, and random weights, where it does not.
    """
    method = settings.get("quant_method")
    if _key(settings) in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return ""
    if method == "bitsandbytes":
        return f"bitsandbytes with neither load_in_4bit nor load_in_8bit; take {FIELD} out if its weights are ordinary"
    named = f"the quantization {method!r}, which transformers does not know" if method else "no method of quantization"
    return f"{named} (quant_method in {FIELD}); name the checkpoint that it was made from"


def _key(settings: Mapping[str, Any]) -> Any:
    """Return the name of a method in transformers' tables: bitsandbytes goes by the flags that came before its name."""
    bits = next((f"bitsandbytes_{bits}" for bits in ("4bit", "8bit") if settings.get(f"load_in_{bits}")), None)
    return bits or settings.get("quant_method")


def quantized_by(config: Any, shards: Shards | None) -> str:
    """Say how the weights of a checkpoint are quantized, by config.json or else by the files; "" if they are not.

    Raises:
        TwofoldError: if config.json names no method that transformers knows, and the files hold nothing that is packed.
    """
    settings = quantization_of(config)
    packed = shards is not None and is_packed(shards.headers)
    if settings is None:
        return f"quantized, though its config.json has no {FIELD}" if packed else ""
    method, unknown = settings.get("quant_method"), _unknown(settings)
    if method == METHOD:
        return ""
    if unknown and not packed:
        raise TwofoldError(f"the model's config.json names {unknown}")
    return f"quantized with {method or ('a method that its config.json does not name' if unknown else 'bitsandbytes')}"


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


def unpack(
    model: Any, shards: Shards, quantization: Mapping[str, Any]
) -> tuple[Mapping[str, Unpacked] | None, list[str]]:
    """Unpack the weights of a checkpoint when they are read; None if their layout is not known here. With it, what to note.

    Args:
        model: without its weights, as config.json describes it but for the quantizer.

    Raises:
        TwofoldError: if the names are those of something around the model, or a weight can't be told from the files.
    """
    stored = find_stored(model, shards)
    check_wrapped(stored, model)
    strange = {key for key, reason in stored.unused.items() if reason not in (BY_RULE, COMPUTED)}
    prefix = f"{model.base_model_prefix}."
    turned = {name for key in _turned(model) for name in (key, key.removeprefix(prefix))}  # as files may call them
    tensors = unpacked_tensors(shards, quantization, strange, turned)
    bare = sorted(key for key, tensor in (tensors or {}).items() if tensor.dtype in FLOAT8 and key not in strange)
    note = f"the files hold {len(bare)} weights of 8 bits without scales, first {bare[0] if bare else ''}: read as they stand"
    return tensors, [note] if bare else []


def _turned(model: Any) -> set[str]:
    """Return the weights that a model holds as (inputs, outputs); libraries of quantization make linear layers of them."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def load_dequantized(
    model_class: Any, config: Any, shards: Shards, source: str | Path, name: str, how: str, **settings: Any
) -> tuple[Any, dict[str, Any], list[str]]:
    """Load a quantized checkpoint as an ordinary model: its weights unpacked here, or else by transformers.

    Args:
        config: as it stands in the checkpoint; the settings of its quantizer are taken out.
        settings: of ``from_pretrained``.

    Returns:
        The model, what ``from_pretrained`` tells of its loading, and what to note of the files.

    Raises:
        TwofoldError: if it can't be done, naming what it lacks.
    """
    quantization = quantization_of(config) or {}
    config = without_quantization(config)
    skeleton = model_on_meta(model_class, config, settings["trust_remote_code"])
    tensors: Mapping[str, Any] | None
    tensors, notes = unpack(skeleton, shards, quantization)
    if tensors is None:
        if _unknown(quantization):
            raise TwofoldError(
                f"the model {name} is {how}, in a layout that is not known here; name the model that it was made from"
            )

        def words(error: Exception) -> str:
            lacks = re.search(r"pip install (?:-U |--upgrade )?[`'\"]?([\w-]+)", str(error))
            remedy = f"install {lacks[1]}, or name" if lacks else "name"
            return (
                f"the model {name} is {how}, and transformers can't dequantize it here ({first_line(error)}); {remedy} the "
                "model that it was made from"
            )

        with errors_in_words(words), silence():
            tensors = _by_transformers(model_class, quantization, source, settings, _turned(skeleton))
    with errors_in_words(lambda error: f"the model {name}, dequantized, can't be loaded: {first_line(error)}"):
        model, report = type(skeleton).from_pretrained(None, config=config, state_dict=tensors, **settings)
    model.config._name_or_path = str(source)
    return model, report, notes


def _by_transformers(
    model_class: Any, quantization: dict[str, Any], source: str | Path, settings: dict[str, Any], turned: set[str]
) -> dict[str, Tensor]:
    """Load and dequantize by the means of transformers, as far as a method has any; return the weights.

    Args:
        turned: the weights that are to be (inputs, outputs).

    Raises:
        ValueError: if a weight stays packed, or was not found.
    """
    kind, asked = AUTO_QUANTIZATION_CONFIG_MAPPING[_key(quantization)], {}
    if "dequantize" in vars(kind.from_dict(dict(quantization))):  # while the weights are loaded
        asked = {FIELD: kind.from_dict({**quantization, "dequantize": True})}
    model, report = model_class.from_pretrained(source, **asked, **settings)
    if report["missing_keys"]:
        raise ValueError(f"it finds no {min(report['missing_keys'])}")
    tensors: dict[str, Any] = model.state_dict()
    # Numbers that know themselves what they stand for, as torchao's.
    knowing = {key for key, tensor in tensors.items() if type(tensor) is not Tensor and hasattr(tensor, "dequantize")}
    if getattr(model, "hf_quantizer", None) is not None and not knowing:
        tensors = model.dequantize(settings["dtype"]).state_dict()
    tensors |= {key: tensors[key].dequantize() for key in knowing}
    made_linear = turned - _turned(model)
    tensors |= {key: tensors[key].T.contiguous() for key in made_linear}
    packed = next((key for key, tensor in tensors.items() if tensor.dim() > 1 and not tensor.is_floating_point()), None)
    if packed is not None:
        raise ValueError(f"it leaves {packed} packed")
    return tensors
