"""The weights of a checkpoint on disk: names, shapes and dtypes from the headers, and tensors when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twofold.checkpoint.headers import TensorHeader, read_headers, weight_files
from twofold.errors import TwofoldError

PART = 1 << 24  # numbers that are checked at once


@dataclass(frozen=True)
class Shards:
    """The safetensors files of a folder."""

    folder: Path
    headers: dict[str, TensorHeader]

    @classmethod
    def open(cls, folder: Path, name: str = "") -> Shards:
        """Read the headers of all files; no weight is read.

        Args:
            name: of the model, for messages.

        Raises:
            TwofoldError: if a file is missing, cut short or no safetensors, or the index does not agree with them.
        """
        return cls(folder, read_headers(weight_files(folder, name or str(folder))))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors by name, mapped from their files; they stay valid for as long as they are kept.

        Raises:
            TwofoldError: if a file can't be read.
        """
        files: dict[Path, list[str]] = {}
        for name in names:
            files.setdefault(self.headers[name].file, []).append(name)
        for path, inside in files.items():
            try:
                with safe_open(path, "pt") as file:
                    for key in inside:
                        yield key, file.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise TwofoldError(
                    f"the weights in {path} can't be read ({error}); fetch the checkpoint again"
                ) from error

    def hash(self, settings: str) -> str:
        """Hash all weights and a text; weights are read one at a time so that no file stays in memory."""
        digest = hashlib.sha256(settings.encode())
        for name in sorted(self.headers):
            header = self.headers[name]
            digest.update(f"{name} {header.shape} {header.dtype}".encode())
            for _, tensor in self.read([name]):
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def check_finite_tensor(name: str, tensor: Tensor, source: object) -> None:
    """Refuse a weight that is NaN or infinite; checked in parts, since a check takes several times the memory of its tensor.

    Raises:
        TwofoldError: naming it, and the model or folder that it belongs to.
    """
    if not tensor.is_floating_point():
        return
    if not all(torch.isfinite(part).all() for part in torch.split(tensor.reshape(-1), PART)):
        raise TwofoldError(
            f"the weight {name} of {source} holds NaN or infinity; the checkpoint is broken, fetch it again"
        )
