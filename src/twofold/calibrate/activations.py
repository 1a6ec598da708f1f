"""Hidden states of all calibration windows between two stretches of blocks: in memory, or in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twofold.errors import TwofoldError


@dataclass
class Activations:
    """A tensor (windows, length, width) that is written and read a few windows at a time."""

    windows: int
    path: Path | None = None
    _tensor: Tensor | None = None
    _shape: tuple[int, ...] = ()  # of one window
    _dtype: torch.dtype = torch.float32

    def write(self, first: int, batch: Tensor) -> None:  # batch (b, length, width)
        """Write the windows first … first + b − 1."""
        batch = batch.detach().cpu().contiguous()
        self._shape, self._dtype = tuple(batch.shape[1:]), batch.dtype
        if self.path is None:
            if self._tensor is None:
                self._tensor = torch.empty(self.windows, *self._shape, dtype=batch.dtype)
            self._tensor[first : first + len(batch)] = batch
            return
        try:
            with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                file.seek(first * self._window_bytes)
                file.write(batch.view(torch.uint8).numpy().data)
        except OSError as error:
            raise TwofoldError(
                f"the hidden states can't be written to {self.path}: {error.strerror}; free some space, set TWOFOLD_CACHE to "
                "another disk, or keep them in memory with `activations=memory`"
            ) from error

    def read(self, first: int, last: int) -> Tensor:  # (last − first, length, width)
        """Read the windows first … last − 1."""
        if self.path is None:
            assert self._tensor is not None
            return self._tensor[first:last].clone()
        batch = torch.empty(last - first, *self._shape, dtype=self._dtype)
        try:
            with self.path.open("rb") as file:
                file.seek(first * self._window_bytes)
                whole = file.readinto(batch.view(torch.uint8).numpy().data) == batch.nbytes
        except OSError as error:
            raise TwofoldError(
                f"the hidden states in {self.path} can't be read: {error.strerror}; run again"
            ) from error
        if not whole:
            raise TwofoldError(
                f"the hidden states in {self.path} are cut short; delete {self.path.parent} and run again"
            )
        return batch

    def shaped(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Take note of what an earlier process wrote to the file: the shape of one window, and the dtype."""
        self._shape, self._dtype = shape, dtype

    def whole(self, windows: int) -> bool:
        """Say whether so many windows have been written to the file, from the first on."""
        written = self.path.stat().st_size if self.path is not None and self.path.is_file() else 0
        return written >= windows * self._window_bytes

    @property
    def _window_bytes(self) -> int:
        return int(torch.Size(self._shape).numel()) * self._dtype.itemsize

    def remove(self) -> None:
        """Give the memory or the disk back."""
        self._tensor = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)
