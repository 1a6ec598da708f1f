"""One vector of each sample, out of what a base model gives: as sentence-transformers' files say, else as is usual for it."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.model.blocks import has_two_stacks

PROJECTED = ("text_embeds", "image_embeds")  # what models of two towers give


def is_text(model: Any) -> bool:
    """Say whether a model reads text."""
    return getattr(model, "main_input_name", "input_ids") == "input_ids"


def sees(model: Any) -> bool:
    """Say whether a model looks at pictures."""
    return not is_text(model) or hasattr(model.config, "vision_config")


def pooled(result: Any, model: Any) -> Tensor:  # (vectors, width)
    """Return the vectors of a batch whose samples are not padded.

    Raises:
        TwofoldError: if the model gives no features.
    """
    embeds = [found for name in PROJECTED if isinstance(found := getattr(result, name, None), Tensor)]
    if embeds:
        return torch.stack(embeds, 1).flatten(0, 1)  # those of one sample together
    states = getattr(result, "last_hidden_state", None)
    own = getattr(result, "pooler_output", None)
    if isinstance(own, Tensor) and own.dim() == 2 and not is_text(model):
        return own
    if not isinstance(states, Tensor):
        raise TwofoldError(f"{type(model).__name__} gives no features")
    if states.dim() != 3:
        return states.flatten(2).mean(-1)  # maps of features (batch, width, height, width)
    mode = _mode(str(getattr(model, "name_or_path", ""))) or ("mean" if is_text(model) else "cls")
    if mode == "lasttoken" or (mode == "mean" and _writes(model)):
        return states[:, -1]
    if mode == "cls":
        return states[:, 0]
    return states.amax(1) if mode == "max" else states.mean(1)


def _writes(model: Any) -> bool:
    """Say whether a model looks back alone, so that the last state has seen all."""
    from twofold.task import classes_of

    base = type(model).__name__.removesuffix("Model")
    return not has_two_stacks(model) and f"{base}ForCausalLM" in classes_of("CAUSAL_LM")


@lru_cache
def _mode(folder: str) -> str:
    """Return how sentence-transformers pools, by the files of a folder; empty if it has none."""
    path = Path(folder) / "1_Pooling" / "config.json"
    if not folder or not path.is_file():
        return ""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        named = settings.get("pooling_mode")
        modes = [
            key.removeprefix("pooling_mode_") for key, on in settings.items() if key.startswith("pooling_mode_") and on
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise TwofoldError(f"{path} can't be read ({error}); mend it, or take it away") from error
    mode = str(named or (modes[0] if len(modes) == 1 else "")).removesuffix("_tokens").removesuffix("_token")
    if mode not in ("mean", "cls", "max", "lasttoken"):
        raise TwofoldError(
            f"{path} asks for pooling by {mode or 'several ways'}, which is not known here; use mean, cls or max"
        )
    return mode
