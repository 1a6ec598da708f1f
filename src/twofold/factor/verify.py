"""The bytes in the files of a checkpoint with integers, against those of its plan."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import nn

from twofold.checkpoint.headers import Stored
from twofold.nn.layers.tied import TiedLinear
from twofold.planning.plan import Plan


def stored_bytes(folder: Path) -> int:
    """The bytes of all tensors in the weight files of a folder."""
    total = 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                total += Stored(path, tuple(part.get_shape()), part.get_dtype()).bytes
    return total


def verify_bytes(folder: Path, plan: Plan, model: nn.Module) -> None:
    """Count what was really stored, so that no figure of the plan goes unchecked.

    Raises:
        RuntimeError: if it is not what the plan says; a failure of ours.
    """
    ours = tuple(f"{entry.name}." for entry in plan.entries if entry.replaced)
    ours += tuple(f"{entry.name.removesuffix('.weight')}." for entry in plan.dense if entry.bits is not None)
    persistent = model.state_dict()
    ours += tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, TiedLinear))
    foreign = {
        id(b): b.numel() * b.element_size()
        for n, b in model.named_buffers()
        if n in persistent and not n.startswith(ours)
    }
    stored, planned = stored_bytes(folder), plan.bytes_after + sum(foreign.values())
    if stored != planned:
        raise RuntimeError(f"the checkpoint holds {stored} bytes, the plan says {planned}; please report this")
