"""A factored checkpoint written block by block, while the weights of one block at a time are in memory."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twofold.checkpoint.headers import read_headers
from twofold.checkpoint.plugin import TwofoldConfig
from twofold.checkpoint.shards import check_finite_tensor
from twofold.errors import TwofoldError
from twofold.factor.apply import factor_entries
from twofold.factor.outcome import Outcome
from twofold.factor.prepared import Prepared
from twofold.host import processes
from twofold.host.files import write_text, write_whole
from twofold.host.progress import progress
from twofold.model.streamed import EMBEDDING, HEAD, Streamed
from twofold.model.written import write_generation
from twofold.planning.plan import PlanEntry


def write_units(folder: Path, prepared: Prepared, *, quiet: bool = False) -> int:
    """Write every part of the checkpoint that the folder does not hold already; many processes share the parts.

    The plan becomes what was carried out.

    Returns:
        How many parts there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan, residence = prepared.plan, prepared.loaded.residence
    assert isinstance(residence, Streamed)
    planned = plan.model_dump(mode="json", include={"entries", "objective", "element_bytes"})
    mark = hashlib.sha256(json.dumps(planned, sort_keys=True).encode()).hexdigest()
    blocks = residence.chain.blocks
    units: list[tuple[str, ...]] = [(EMBEDDING, "", HEAD), *((block,) for block in blocks)]
    paths = [folder / f"model-{i + 1:05d}-of-{len(units):05d}.safetensors" for i in range(len(units))]
    seen: set[str] = set()
    with progress("Factorizing", len(plan.entries), unit="weights", quiet=quiet) as tick:
        for number, (unit, path) in enumerate(zip(units, paths, strict=True)):
            keys = [key for part in unit for key in residence.stored_keys(part) if key not in seen]
            seen |= set(keys)
            if number % processes.world() != processes.rank():
                continue
            inside = [entry for entry in plan.entries if residence.unit_of(entry.name) in unit]
            if _read_record(path, mark) is not None:
                tick(len(inside))
                continue
            with residence.hold([part for part in unit if part in blocks]):
                decomposition, stored = prepared.decomposition, prepared.loaded.stored_dtype
                outcomes = factor_entries(prepared.loaded.model, inside, decomposition, stored, tick)
                _write_unit(path, residence, keys, outcomes, stored, mark)
        processes.wait()
    entries: dict[str, PlanEntry] = {}
    notes = list(plan.notes)
    for path in paths:
        record = _read_record(path, mark)
        if record is None:
            raise TwofoldError(f"{path} is not whole; run again")
        entries |= {entry.name: entry for entry in record[0]}
        notes += record[1]
    carried = [entries.get(entry.name, entry) for entry in plan.entries]
    prepared.plan = plan.model_copy(update={"entries": carried, "notes": notes})
    return len(units)


def _write_unit(
    path: Path, residence: Streamed, keys: list[str], outcomes: Iterable[Outcome], stored: torch.dtype, mark: str
) -> None:
    """Write the tensors of one part: the dense ones as they are stored, the factored ones in the place of their weight."""
    tensors: dict[str, Tensor] = {}
    record: dict[str, Any] = {"mark": mark, "entries": [], "notes": [], "layers": {}}
    replaced: set[str] = set()
    for layer, entry, note in outcomes:
        key = residence.keys[f"{entry.name}.weight"]
        stem = residence.written.get(key, key).removesuffix("weight")
        replaced.add(key)
        for name, tensor in layer.state_dict().items():
            if name != "bias":
                tensors[stem + name] = tensor.to(stored) if tensor.is_floating_point() else tensor
            elif entry.centred:
                bias = residence.keys[f"{entry.name}.bias"]
                tensors[residence.written.get(bias, bias)] = tensor.to(residence.shards.headers[bias].torch_dtype)
                replaced.add(bias)
        record["entries"].append(entry.model_dump(mode="json"))
        record["notes"] += [note] if note is not None else []
        record["layers"][entry.name] = layer.settings()
    for key, tensor in residence.shards.read([key for key in keys if key not in replaced]):
        check_finite_tensor(key, tensor, residence.shards.folder)
        tensors[residence.written.get(key, key)] = tensor.contiguous()
    path.with_suffix(".json").unlink(missing_ok=True)  # it describes the part that is replaced now
    write_whole(path, lambda place: save_file(tensors, place, {"format": "pt"}))
    write_text(path.with_suffix(".json"), json.dumps(record))


def _read_record(path: Path, mark: str) -> tuple[list[PlanEntry], list[str]] | None:
    """Return the entries and notes that were written down of a part; None if it is not whole, or of another plan."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if record["mark"] != mark:
            return None
        with safe_open(path, "pt"):  # its header agrees with its length
            dict(record["layers"])  # parts of an earlier version do not say how their layers are stored
            return [PlanEntry.model_validate(entry) for entry in record["entries"]], list(record["notes"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def assemble_checkpoint(folder: Path, parts: Path, residence: Streamed, stored: torch.dtype) -> None:
    """Put the parts in a checkpoint's folder, with the index and the configuration that load it."""
    for path in sorted(parts.glob("model-*.safetensors")):
        (folder / path.name).unlink(missing_ok=True)
        try:
            (folder / path.name).hardlink_to(path)
        except OSError:  # another file system
            shutil.copyfile(path, folder / path.name)
    headers = read_headers({path: set() for path in sorted(folder.glob("model-*.safetensors"))})
    weight_map = {name: headers[name].file.name for name in sorted(headers)}
    index = {"metadata": {"total_size": sum(h.bytes for h in headers.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    model: Any = residence.model
    config = copy.deepcopy(model.config)
    layers: dict[str, Any] = {}
    for path in sorted(parts.glob("model-*.json")):
        layers |= json.loads(path.read_text(encoding="utf-8"))["layers"]
    config.quantization_config = TwofoldConfig(layers)
    config.dtype = stored
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    write_generation(model, folder)
