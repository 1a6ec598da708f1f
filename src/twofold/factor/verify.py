"""What the files of a checkpoint hold, against its plan."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from twofold.checkpoint.headers import read_headers
from twofold.nn.layers.tied import TiedLinear
from twofold.nn.places import BASES
from twofold.planning.plan import Plan


def verify(folder: Path, plan: Plan, model: nn.Module) -> None:
    """Count the bytes that were really stored, so that no figure of the plan goes unchecked.

    Raises:
        RuntimeError: if it is not what the plan says; a failure of ours.
    """
    headers = read_headers({path: set() for path in folder.glob("model*.safetensors")}).values()
    layers = [entry.name for entry in plan.entries if entry.replaced]
    layers += [entry.name.removesuffix(".weight") for entry in plan.dense if entry.bits is not None]
    layers += [name for name, module in model.named_modules() if isinstance(module, TiedLinear)]
    bases = {f"{BASES}.{entry.basis}." for entry in plan.entries if entry.basis is not None}

    def planned_for(name: str) -> bool:
        return name.startswith(tuple(f"{layer}." for layer in layers)) or any(basis in name for basis in bases)

    persistent = model.state_dict()
    foreign = {id(b): b for n, b in model.named_buffers() if n in persistent and not planned_for(n)}.values()
    made_anew = getattr(model, "_keys_to_ignore_on_save", None) or ()
    unsaved = [entry.weight_bytes(plan.element_bytes) for entry in plan.dense if entry.name in made_anew]
    stored = sum(header.bytes for header in headers)
    planned = plan.bytes_after + sum(buffer.numel() * buffer.element_size() for buffer in foreign) - sum(unsaved)
    if stored != planned:
        raise RuntimeError(f"the checkpoint holds {stored} bytes, the plan says {planned}; please report this")
