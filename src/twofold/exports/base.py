"""What a format is: a function that writes a model to a folder and gives back how to read it there."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from twofold.errors import TwofoldError
from twofold.exports.decoding import Decoder
from twofold.model.load import LoadedModel
from twofold.nn.compact import Compact, CompactLinear
from twofold.nn.int_matrix import IntMatrix

EXTRA = "pip install 'twofold[export]'"
NAMES = {"lm_eval": "lm-eval"}  # of packages, where they differ from those of their modules


@dataclass(frozen=True)
class Source:
    """The model to export, and what the user said beside the format."""

    loaded: LoadedModel
    dtype: torch.dtype  # of the exported weights
    rank: int | None = None
    base: str | None = None

    @property
    def model(self) -> Any:
        return self.loaded.model


@dataclass(frozen=True)
class Written:
    """What was written: how it is read again, by the programs that it is for, and what there is to say of it."""

    decoder: Callable[[], Decoder]
    notes: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32  # of the computation that the logits are compared in


Write: TypeAlias = Callable[[Source, Path], Written]


@dataclass(frozen=True)
class Format:
    """A form that a model is exported in."""

    name: str
    write: Write
    factored: bool  # whether it takes only models with factored layers
    needs: tuple[str, ...]  # modules of packages that Twofold does not depend on
    integers: bool = False  # whether it takes layers of integers, which it merges

    def check(self) -> None:
        """Refuse what can't be written here, before any work.

        Raises:
            TwofoldError: if a package is missing.
        """
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            raise TwofoldError(
                f"`to={self.name}` needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
                f"installed: {EXTRA}"
            )


FORMATS: dict[str, Format] = {}


def export_format(
    name: str, *, factored: bool = False, needs: tuple[str, ...] = (), integers: bool = False
) -> Callable[[Write], Write]:
    """Register a function (source, folder) → what was written as a format."""

    def register(function: Write) -> Write:
        FORMATS[name] = Format(name, function, factored, needs, integers)
        return function

    return register


def get_format(name: str) -> Format:
    """The format of a name.

    Raises:
        TwofoldError: if there is none.
    """
    if name not in FORMATS:
        raise TwofoldError(f"there is no export format {name!r}; choose one of {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


def recorded_original(loaded: LoadedModel) -> str:
    """The model that a checkpoint was made from, as its record says.

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
    """The layers of a model that take the place of dense ones, by name."""
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
