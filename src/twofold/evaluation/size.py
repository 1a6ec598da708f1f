"""Sizes of a model: parameters, bytes in memory, bytes on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from twofold.nn.int_matrix import IntMatrix


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    parameters: int
    memory: int  # bytes of parameters and buffers
    disk: int | None  # bytes of the weight files, None if it is on no disk


def memory_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones counted once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def disk_bytes(folder: Path | None) -> int | None:
    """Bytes of the weight files in a folder; the spectra beside a factored checkpoint are none."""
    if folder is None or not folder.is_dir():
        return None
    return weight_bytes(folder)


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != "spectra.safetensors")


def model_size(model: nn.Module, folder: Path | None = None) -> Size:
    """The three sizes of a model."""
    parameters = {id(p): p.numel() for p in model.parameters()}
    parameters |= {id(m): m.numbers for m in model.modules() if isinstance(m, IntMatrix)}
    return Size(sum(parameters.values()), memory_bytes(model), disk_bytes(folder))
