"""What the weight files of a checkpoint say of themselves, checked before any weight is read.

The safetensors library makes sure that a header is whole and covers its file. This module makes sure that the files are those
of the folder, and that the index agrees with them.
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

from twofold.checkpoint.configuration import read_config
from twofold.checkpoint.recognize import recognize
from twofold.errors import TwofoldError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorHeader:
    """What a weight file says of one tensor."""

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
    """Return the weight map of a shard index: tensor → file.

    Raises:
        TwofoldError: if it can't be read, or names anything but safetensors files beside it.
    """
    try:
        weight_map = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TwofoldError(f"the index {path} can't be read; fetch the checkpoint again") from error
    if not weight_map:
        raise TwofoldError(f"the index {path} names no weights; fetch the checkpoint again")
    for shard in weight_map.values():
        _check_name(shard, f"the index {path}")
    return weight_map


def _check_name(file: Any, who: str) -> None:
    """Refuse a name that is not that of a safetensors file in the same folder."""
    if not isinstance(file, str) or not file.isprintable() or len(os.fsencode(file)) > 255:
        raise TwofoldError(
            f"{who} names a file {str(file)[:80]!r}, which is not a file name; fetch the checkpoint again"
        )
    if Path(file).name != file:
        raise TwofoldError(f"{who} names a file outside of its folder, {file}; do not use this checkpoint")
    if not file.endswith(".safetensors"):
        raise TwofoldError(f"{who} names {file}, which is not a safetensors file (pickles can run code)")


def weight_files(folder: Path, name: str) -> dict[Path, set[str]]:
    """Find the files that transformers would load, each with the tensors that the index promises in it.

    Raises:
        TwofoldError: if there are none, one is missing, or one is a link out of the folder.
    """
    named = read_config(folder).get("transformers_weights")
    setting = f"transformers_weights in {folder / 'config.json'}"
    if named is not None and not str(named).endswith(".safetensors.index.json"):
        _check_name(named, setting)
    single, index = folder / str(named or SINGLE), folder / str(named or INDEX)
    if named is not None and Path(named).name != named:
        raise TwofoldError(f"{setting} leads out of the folder, to {named}")
    promised: dict[Path, set[str]] = {}
    if single.suffix == ".safetensors" and (single.is_file() or single.is_symlink()):
        promised[single] = set()
    elif index.suffix == ".json" and index.is_file():
        for tensor, shard in read_index(index).items():
            promised.setdefault(folder / shard, set()).add(tensor)
    else:
        says = f" ({named}, as its transformers_weights says)" if named else ""
        what = recognize(folder) or "Twofold loads no other format (pickles can run code)"
        raise TwofoldError(f"{name} has no weights in safetensors{says}; it {what}".replace("it Twofold", "Twofold"))
    for file in promised:
        _check_link(file, folder)
    absent = sorted(file.name for file in promised if not file.is_file())
    if absent:
        raise TwofoldError(
            f"the checkpoint {name} lacks {len(absent)} of {len(promised)} shards, first {absent[0]}; fetch it again"
        )
    return promised


def leads_out(file: Path, folder: Path) -> Path | None:
    """Return where a link out of its folder leads; in the hub's cache files are links to the blobs of their repository."""
    try:
        target, home = file.resolve(), folder.resolve()
    except (OSError, RuntimeError):
        return file
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return None if target.is_relative_to(home) or target.is_relative_to(blobs) else target


def _check_link(file: Path, folder: Path) -> None:
    """Refuse a link that leads out of its folder."""
    target = leads_out(file, folder)
    if target == file:
        raise TwofoldError(f"the weight file {file} is a link to nothing; fetch it again")
    if target is not None:
        raise TwofoldError(
            f"the weight file {file} is a link to {target}, outside of its folder; put the file itself there if you trust it"
        )


def read_headers(files: dict[Path, set[str]]) -> dict[str, TensorHeader]:
    """Read the header of every tensor in the weight files, by name; no weight is read.

    Args:
        files: each with the names of tensors that must be in it.

    Raises:
        TwofoldError: if a file is not whole, does not hold what the index says, or repeats a tensor of another one.
    """
    headers: dict[str, TensorHeader] = {}
    for file, promised in files.items():
        try:
            with safe_open(file, "pt") as opened:
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                stored = {n: TensorHeader(file, tuple(p.get_shape()), p.get_dtype()) for n, p in parts.items()}
        except (SafetensorError, OSError) as error:
            raise TwofoldError(f"the weight file {file} can't be read ({error}); fetch it again") from error
        if not stored:
            raise TwofoldError(f"the weight file {file} holds no weights; fetch it again")
        for name in promised - stored.keys():
            raise TwofoldError(f"{file} lacks {name}, which the index says is in it; fetch the checkpoint again")
        for name in stored.keys() & headers.keys():
            raise TwofoldError(
                f"the weight {name} is in {headers[name].file.name} and in {file}; fetch the checkpoint again"
            )
        headers |= stored
    return headers
