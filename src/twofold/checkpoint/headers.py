"""What the weight files of a checkpoint say of themselves, checked before any weight is read.

The safetensors library makes sure that a header is whole and covers its file. Here it is made sure that the files are those of
the folder, that the index agrees with them, and that the shapes are those of the model that config.json describes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from twofold.checkpoint.configuration import read_config
from twofold.errors import TwofoldError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Some architectures make a part of their weights anew, so a model may have more numbers than its checkpoint, but not many more.
SLACK, LARGER = 100_000_000, 4


@dataclass(frozen=True)
class Stored:
    """One tensor in a weight file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, BF16, I64, …

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it.

        Raises:
            TwofoldError: if it is none of those that weights are kept in.
        """
        if self.dtype not in DTYPES:
            raise TwofoldError(
                f"{self.file} holds weights of the type {self.dtype}, which can't be factorized; "
                "name the checkpoint in float32, bfloat16 or float16"
            )
        return DTYPES[self.dtype]


def read_index(path: Path) -> dict[str, str]:
    """The weight map of a shard index: tensor → file.

    Raises:
        TwofoldError: if it can't be read, or names anything but safetensors files beside it.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        places = index["weight_map"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TwofoldError(f"the index {path} can't be read; fetch the checkpoint again") from error
    if not places:
        raise TwofoldError(f"the index {path} names no weights; fetch the checkpoint again")
    for shard in (shard for _, shard in places):
        _check_name(shard, f"the index {path}")
    return dict(places)


def _check_name(file: Any, who: str) -> None:
    """Refuse a name that is no safetensors file in the same folder."""
    if not isinstance(file, str) or not file.isprintable() or len(os.fsencode(file)) > 255:
        raise TwofoldError(f"{who} names a file by what is no name, {str(file)[:80]!r}; fetch the checkpoint again")
    if Path(file).name != file:
        raise TwofoldError(f"{who} names a file outside of its folder, {file}; do not use this checkpoint")
    if not file.endswith(".safetensors"):
        raise TwofoldError(f"{who} names {file}, which is no safetensors file (pickles can run code)")


def weight_files(folder: Path, name: str) -> dict[Path, set[str]]:
    """The files that transformers would load, each with the tensors that the index promises in it.

    Raises:
        TwofoldError: if there are none, one is missing, or one is a link out of the folder.
    """
    chosen = read_config(folder).get("transformers_weights")
    if chosen is not None and not str(chosen).endswith(".safetensors.index.json"):
        _check_name(chosen, f"transformers_weights in {folder / 'config.json'}")
    single, index = folder / str(chosen or SINGLE), folder / str(chosen or INDEX)
    if chosen is not None and Path(chosen).name != chosen:
        raise TwofoldError(f"transformers_weights in {folder / 'config.json'} leads out of the folder, to {chosen}")
    promised: dict[Path, set[str]] = {}
    if single.suffix == ".safetensors" and (single.is_file() or single.is_symlink()):
        promised[single] = set()
    elif index.suffix == ".json" and index.is_file():
        for tensor, shard in read_index(index).items():
            promised.setdefault(folder / shard, set()).add(tensor)
    else:
        raise TwofoldError(
            f"{name} has no weights in safetensors{f' ({chosen}, as its transformers_weights says)' if chosen else ''}; "
            "Twofold loads no other format (pickles can run code)"
        )
    for file in promised:
        _check_link(file, folder)
    absent = sorted(file.name for file in promised if not file.is_file())
    if absent:
        raise TwofoldError(
            f"the checkpoint {name} lacks {len(absent)} of {len(promised)} shards, first {absent[0]}; fetch it again"
        )
    return promised


def _check_link(file: Path, folder: Path) -> None:
    """Refuse a link that leads out of its folder; in the hub's cache files are links to the blobs of their repository."""
    try:
        target, home = file.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise TwofoldError(f"the weight file {file} is a link to nothing; fetch it again") from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not target.is_relative_to(home) and not target.is_relative_to(blobs):
        raise TwofoldError(
            f"the weight file {file} is a link to {target}, outside of its folder; put the file itself there if you trust it"
        )


def read_headers(files: dict[Path, set[str]]) -> dict[str, Stored]:
    """Every tensor in the weight files, by name; no weight is read.

    Raises:
        TwofoldError: if a file is not whole, does not hold what the index says, or repeats a tensor of another one.
    """
    found: dict[str, Stored] = {}
    for file, promised in files.items():
        try:
            with safe_open(file, "pt") as opened:
                names = list(opened.keys())
                parts = [opened.get_slice(name) for name in names]
                stored = {
                    name: Stored(file, tuple(part.get_shape()), part.get_dtype())
                    for name, part in zip(names, parts, strict=True)
                }
        except (SafetensorError, OSError) as error:
            raise TwofoldError(f"the weight file {file} can't be read ({error}); fetch it again") from error
        if not stored:
            raise TwofoldError(f"the weight file {file} holds no weights; fetch it again")
        for name in promised - stored.keys():
            raise TwofoldError(f"{file} lacks {name}, which the index says is in it; fetch the checkpoint again")
        for name in stored.keys() & found.keys():
            raise TwofoldError(
                f"the weight {name} is in {found[name].file.name} and in {file}; fetch the checkpoint again"
            )
        found |= stored
    return found


def check_fit(stored: dict[str, Stored], model: nn.Module, name: str) -> None:
    """Compare the stored tensors with an empty model, so that a wrong configuration can't ask for absurd amounts of memory.

    transformers may store a weight under another name or turned, so a tensor is compared by its count of numbers where the
    names are the same; the exact shapes are checked when they are loaded.

    Args:
        model: made from the configuration, on the meta device.

    Raises:
        TwofoldError: naming the first tensor of another size or kind, or both sizes if the model is far larger.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for key, tensor in model.state_dict().items():
        one = stored.get(key) or stored.get(key.removeprefix(prefix)) or stored.get(prefix + key)
        if one is None:
            continue
        if math.prod(one.shape) != tensor.numel():
            raise TwofoldError(
                f"the weight {key} in {one.file} has the shape {one.shape}, its config.json says {tuple(tensor.shape)}; "
                "fetch the checkpoint again"
            )
        if tensor.is_floating_point() != one.dtype.startswith(("F", "BF")):
            wanted = "a floating-point type" if tensor.is_floating_point() else "integers"
            raise TwofoldError(
                f"the weight {key} in {one.file} is of type {one.dtype}, the model needs {wanted}; fetch the checkpoint again"
            )
    asked = sum(parameter.numel() for parameter in model.parameters())
    held = sum(math.prod(one.shape) for one in stored.values())
    if asked > LARGER * held + SLACK:
        raise TwofoldError(
            f"the config.json of {name} describes a model of {asked:,} numbers, its weight files hold {held:,}; "
            "fetch the checkpoint again"
        )
