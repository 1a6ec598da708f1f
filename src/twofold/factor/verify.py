"""What the files of a checkpoint hold, against its plan."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from safetensors import safe_open
from torch import nn

from twofold.checkpoint.headers import Stored
from twofold.nn.layers.tied import TiedLinear
from twofold.nn.places import BASES
from twofold.planning.plan import Plan


def verify(folder: Path, plan: Plan, model: nn.Module) -> None:
    """Count what was really stored, so that no figure of the plan goes unchecked: numbers, or bytes where some are integers.

    Raises:
        RuntimeError: if it is not what the plan says; a failure of ours.
    """
    if plan.integers:
        _verify_bytes(folder, plan, model)
        return
    stored = sum(prod(tensor.shape) for tensor in _stored(folder))
    ours = sum(1 for entry in plan.entries if entry.rank is not None) + plan.order_numbers
    factored = tuple(f"{entry.name}." for entry in plan.entries if entry.rank is not None)
    bases = {f"{BASES}.{entry.basis}." for entry in plan.entries if entry.basis is not None}
    persistent = model.state_dict().keys()
    buffers = {
        id(b): b.numel()
        for n, b in model.named_buffers()
        if n in persistent and not (factored and n.startswith(factored)) and not any(basis in n for basis in bases)
    }
    foreign = sum(buffers.values())
    if stored != plan.model_after + ours + foreign:
        raise RuntimeError(
            f"the checkpoint holds {stored} numbers, the plan says {plan.model_after + ours + foreign}; please report this"
        )


def _stored(folder: Path) -> Iterator[Stored]:
    """Yield what the headers of the weight files of a folder say of each tensor."""
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield Stored(path, tuple(part.get_shape()), part.get_dtype())


def _verify_bytes(folder: Path, plan: Plan, model: nn.Module) -> None:
    ours = tuple(f"{entry.name}." for entry in plan.entries if entry.replaced)
    ours += tuple(f"{entry.name.removesuffix('.weight')}." for entry in plan.dense if entry.bits is not None)
    persistent = model.state_dict()
    ours += tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, TiedLinear))
    foreign = {
        id(b): b.numel() * b.element_size()
        for n, b in model.named_buffers()
        if n in persistent and not n.startswith(ours)
    }
    stored = sum(tensor.bytes for tensor in _stored(folder))
    planned = plan.bytes_after + sum(foreign.values())
    if stored != planned:
        raise RuntimeError(f"the checkpoint holds {stored} bytes, the plan says {planned}; please report this")
