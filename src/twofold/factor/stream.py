"""A factored checkpoint written block by block, while the weights of one block at a time are in memory."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twofold.checkpoint.headers import read_headers
from twofold.checkpoint.plugin import TwofoldConfig
from twofold.checkpoint.shards import check_finite
from twofold.errors import TwofoldError
from twofold.host import processes
from twofold.host.files import write_text, write_whole
from twofold.host.progress import Tick
from twofold.model.streamed import EMBEDDING, HEAD, Streamed
from twofold.nn.compact import CompactLinear
from twofold.planning.plan import Plan, PlanEntry

Factor = Callable[[list[PlanEntry]], Iterable[tuple[PlanEntry, CompactLinear | None, str | None]]]


def write_units(
    folder: Path,
    residence: Streamed,
    plan: Plan,
    factor: Factor,
    tick: Tick,
) -> tuple[Plan, int]:
    """Write every part of the checkpoint that the folder does not hold already; many processes share the parts.

    Args:
        factor: factors the entries of a block whose weights are in memory.

    Returns:
        The plan as it was carried out, and how many parts there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = plan.model_dump(mode="json", include={"entries", "objective", "element_bytes"})
    mark = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    chain = residence.chain
    units: list[tuple[str, ...]] = [(EMBEDDING, "", HEAD), *((block,) for block in chain.blocks)]
    seen: set[str] = set()
    carried: dict[str, PlanEntry] = {}
    notes = list(plan.notes)
    for number, unit in enumerate(units):
        keys = [key for part in unit for key in residence.stored_keys(part) if key not in seen]
        seen |= set(keys)
        inside = [e for e in plan.entries if residence.unit_of(e.name) in unit]
        path = folder / f"model-{number + 1:05d}-of-{len(units):05d}.safetensors"
        if number % processes.world() == processes.rank() and _made(path, mark) is None:
            with residence.hold([part for part in unit if part in chain.blocks]):
                _write_unit(path, residence, keys, factor(inside), mark)
        elif number % processes.world() == processes.rank():
            tick(len(inside))
    processes.wait()
    for number in range(len(units)):
        path = folder / f"model-{number + 1:05d}-of-{len(units):05d}.safetensors"
        made = _made(path, mark)
        if made is None:
            raise TwofoldError(f"{path} is not whole; run again")
        carried |= {entry.name: entry for entry in made[0]}
        notes += made[1]
    done = [carried[entry.name] for entry in plan.entries]
    return plan.model_copy(update={"entries": done, "notes": notes}), len(units)


def _write_unit(
    path: Path,
    residence: Streamed,
    keys: list[str],
    made: Iterable[tuple[PlanEntry, CompactLinear | None, str | None]],
    mark: str,
) -> None:
    """Write the tensors of one part: the dense ones as they are stored, the factored ones in the place of their weight."""
    tensors: dict[str, Tensor] = {}
    entries: list[PlanEntry] = []
    notes: list[str] = []
    layers: dict[str, Any] = {}
    replaced: set[str] = set()
    for entry, layer, note in made:
        entries.append(entry)
        notes += [note] if note is not None else []
        if layer is not None:
            key = residence.keys[f"{entry.name}.weight"]
            stem = key.removesuffix("weight")
            dtype = residence.shards.headers[key].torch_dtype
            for name, tensor in layer.state_dict().items():
                if name != "bias":
                    tensors[stem + name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            layers[entry.name] = layer.settings()
            replaced.add(key)
    for key, tensor in residence.shards.read([key for key in keys if key not in replaced]):
        check_finite(key, tensor, residence.shards.folder)
        tensors[key] = tensor.contiguous()
    path.with_suffix(".json").unlink(missing_ok=True)  # it told of the part that is replaced now
    write_whole(path, lambda place: save_file(tensors, place, {"format": "pt"}))
    record = {"mark": mark, "entries": [e.model_dump(mode="json") for e in entries], "notes": notes, "layers": layers}
    write_text(path.with_suffix(".json"), json.dumps(record))


def _made(path: Path, mark: str) -> tuple[list[PlanEntry], list[str]] | None:
    """What was written down of a part, if it is whole and belongs to this plan."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if record["mark"] != mark:
            return None
        with safe_open(path, "pt"):  # its header agrees with its length
            dict(record["layers"])  # parts of an earlier version do not say how their layers are stored
            return [PlanEntry.model_validate(entry) for entry in record["entries"]], list(record["notes"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def finish(folder: Path, source: Path, residence: Streamed, stored: torch.dtype) -> None:
    """Put the parts in a checkpoint's folder, with the index and the configuration that load it."""
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(source.glob("model-*.safetensors")):
        (folder / path.name).unlink(missing_ok=True)
        try:
            (folder / path.name).hardlink_to(path)
        except OSError:  # another file system
            shutil.copyfile(path, folder / path.name)
    for name, header in read_headers({path: set() for path in sorted(folder.glob("model-*.safetensors"))}).items():
        weight_map[name] = header.file.name
        total += header.bytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    model: Any = residence.model
    config = copy.deepcopy(model.config)
    layers: dict[str, Any] = {}
    for path in sorted(source.glob("model-*.json")):
        layers |= json.loads(path.read_text(encoding="utf-8"))["layers"]
    config.quantization_config = TwofoldConfig(layers)
    config.dtype = stored
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
