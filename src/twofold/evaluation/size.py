"""Sizes of a model: parameters, bytes in memory, bytes on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from twofold.nn.int_matrix import IntMatrix


def memory_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of the parameters and buffers, shared ones counted once; with a dtype, as if floats were in it."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * (dtype if dtype and t.is_floating_point() else t).itemsize for t in tensors.values())


def disk_bytes(folder: Path | None) -> int | None:
    """Return the bytes of the weight files in a folder, without the spectra; None if there is no folder."""
    if folder is None or not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != "spectra.safetensors")


def parameter_count(model: nn.Module) -> int:
    """Count the numbers that represent the weights, shared ones once."""
    numbers = {id(p): p.numel() for p in model.parameters()}
    numbers |= {id(m): m.numbers for m in model.modules() if isinstance(m, IntMatrix)}
    return sum(numbers.values())
