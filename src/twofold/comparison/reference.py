"""The dense model's logits on the windows that the divergence is taken on, kept on disk so that it runs once for all rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from twofold.calibrate.moments import Parts, read_names, write_part
from twofold.errors import TwofoldError

LIMIT = 8e9  # bytes that they may take; beyond, the dense model runs again for every row
ROOM = 2.0  # times their size that must be free


class Reference:
    """A function from one of the windows to the dense model's logits: those that were kept, to the bit, or else new ones."""

    def __init__(self, folder: Path, mark: str, windows: Tensor) -> None:  # windows (count, window)
        self.folder, self.mark, self.windows = folder, mark, windows

    def logits(
        self, ids: Tensor, dense: Callable[[Tensor], Tensor]
    ) -> Tensor:  # (1, window) to (1, window, vocabulary)
        """The logits of one of the windows.

        Args:
            dense: gives them where they were not kept.
        """
        i = next(i for i, window in enumerate(self.windows) if torch.equal(window, ids[0]))
        path = self.folder / f"{i:05d}.safetensors"
        if path.is_file():
            try:
                read_names(path, self.mark)
                return Parts({"logits": path})["logits"]
            except TwofoldError:
                path.unlink(missing_ok=True)
        logits = dense(ids)
        size = logits.numel() * logits.element_size()
        if size * len(self.windows) <= LIMIT and self._room() > ROOM * size:
            write_part(path, {"logits": logits}, self.mark)
        return logits

    def _room(self) -> int:
        """Free bytes on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.folder).free
