"""What config.json says, checked before a model is made from it: each size is possible."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError

SIZES = (
    "hidden_size", "intermediate_size", "vocab_size", "head_dim", "max_position_embeddings", "num_hidden_layers", "num_layers",
    "num_attention_heads", "num_key_value_heads", "n_embd", "n_layer", "n_head", "n_positions", "d_model", "num_heads",
)  # fmt: skip
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
MOST_LAYERS = 10_000  # each is built, even where no weight is read


def read_config(folder: Path) -> dict[str, Any]:
    """Read the settings in a checkpoint's config.json.

    Raises:
        TwofoldError: if it is not a JSON object, a number in it is NaN, a size is not a whole number above zero, or
            ``quantization_config`` is no settings.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise TwofoldError(f"the configuration {path} can't be read ({reason}); fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise TwofoldError(f"the configuration {path} holds no settings; fetch the checkpoint again")
    text = config.get("text_config")
    for settings in (config, text if isinstance(text, dict) else {}):
        for key in SIZES:
            value = settings.get(key)
            if isinstance(value, bool | float | str) or (isinstance(value, int) and value < 1):
                raise TwofoldError(f"{path}: {key} must be a whole number above 0, got {reprlib.repr(value)}")
        packing = settings.get("quantization_config")
        if packing is not None and not (isinstance(packing, dict) and packing):
            raise TwofoldError(
                f"{path}: quantization_config must say how the weights are packed, got {reprlib.repr(packing)}; "
                "take it out if they are ordinary"
            )
    check_depth(config, path, MOST_LAYERS, "any model has")
    return config


def _constant(word: str) -> float:
    """Read Infinity and -Infinity, which JSON does not have; refuse NaN."""
    if word == "NaN":
        raise ValueError("a number in it is NaN")
    return float(word)


def check_depth(config: Any, path: Path, most: int, words: str) -> None:
    """Refuse a count of layers above ``most`` in any part of a configuration: making so many would take forever.

    Args:
        words: what has fewer, for the message.

    Raises:
        TwofoldError: naming the setting.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            if key in LAYERS and isinstance(value, int) and value > most:
                raise TwofoldError(
                    f"{path}: {key} is {reprlib.repr(value)}, more than {words}; fetch the checkpoint again"
                )
            check_depth(value, path, most, words)
