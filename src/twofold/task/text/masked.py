"""Windows of tokens, some of which are hidden."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twofold.task import LABELS, Batch
from twofold.task.text.texts import TokenWindows


@dataclass(frozen=True)
class MaskedWindows(TokenWindows):
    """Windows of token ids, some of them hidden."""

    hidden: Tensor | None = None  # (windows, window), bool
    mask: int = 0  # the id that hides

    def batch(self, first: int, last: int) -> Batch:
        assert self.hidden is not None
        ids, hidden = self.ids[first:last], self.hidden[first:last]
        return {"input_ids": ids.masked_fill(hidden, self.mask), LABELS: ids.masked_fill(~hidden, -1)}

    def take(self, places: Sequence[int]) -> MaskedWindows:
        assert self.hidden is not None
        return replace(self, ids=self.ids[list(places)], hidden=self.hidden[list(places)])

    def __add__(self, others: TokenWindows) -> MaskedWindows:
        assert isinstance(others, MaskedWindows) and self.hidden is not None and others.hidden is not None
        return replace(self, ids=torch.cat([self.ids, others.ids]), hidden=torch.cat([self.hidden, others.hidden]))

    @property
    def predictions(self) -> int:
        assert self.hidden is not None
        return int(self.hidden.sum())

    @property
    def sha256(self) -> str:
        assert self.hidden is not None
        return hashlib.sha256(super().sha256.encode() + self.hidden.numpy().tobytes()).hexdigest()
