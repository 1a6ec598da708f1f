"""What an export reads of a factored model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from twofold.errors import TwofoldError
from twofold.model.load import LoadedModel
from twofold.nn.compact import Compact, CompactLinear
from twofold.nn.int_matrix import IntMatrix


def recorded_original(loaded: LoadedModel) -> str:
    """Name the model that a checkpoint was made from, as its record says.

    Raises:
        TwofoldError: if it has none.
    """
    try:
        record = (loaded.source or Path()) / "run.json"
        return str(json.loads(record.read_text(encoding="utf-8"))["recipe"]["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TwofoldError(
            f"{loaded.name} has no run.json that says what it was made from; name the original with `base`"
        ) from error


def compact_layers(model: Any) -> dict[str, CompactLinear]:
    """Return the layers of a model that take the place of dense ones, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompactLinear)}


def check_plain(model: Any, name: str, integers: bool = False) -> None:
    """Refuse factors that are quantized: an export holds numbers.

    Args:
        integers: whether the format merges them, so that integers of ours (``bits``) will do.

    Raises:
        TwofoldError: naming the first one.
    """
    for key, module in model.named_modules():
        if isinstance(module, IntMatrix) and not integers:
            raise TwofoldError(
                f"{key} of {name} is kept in integers (`bits`), which this format does not hold; use `to=dense`, or export the "
                "checkpoint that was compressed without `bits`"
            )
        if isinstance(module, Compact):
            for child in module.CHILDREN:
                weight = getattr(module, child).weight
                if type(weight.data) is not torch.Tensor or not weight.is_floating_point():
                    raise TwofoldError(
                        f"the factor {key}.{child} of {name} is quantized, and exports are made from factors that are "
                        "not; export the checkpoint that was compressed without `bits`"
                    )
