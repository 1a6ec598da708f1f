"""What the dense model predicts at each position: its most likely tokens, and how much is left for the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twofold.calibrate.moments import read_names, write_part
from twofold.errors import TwofoldError
from twofold.progress import progress

TOP = 128  # tokens that are kept at a position
PART = 16  # windows in a file
ROWS = 128  # positions whose probabilities are held at once


class Teacher:
    """The log-probabilities of the ``top`` most likely tokens at each position of some windows, on disk or in memory.

    Eight bytes a token and position: 65,536 positions take 67 MB.
    """

    def __init__(self, folder: Path | None, mark: str, top: int = TOP) -> None:
        self.folder, self.top = folder, top
        self.mark = hashlib.sha256(f"{mark} {top}".encode()).hexdigest()
        self._parts: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def ask(self, logits: Callable[[Tensor], Tensor], windows: Tensor, name: str, *, quiet: bool = False) -> None:
        """Run the dense model over windows (count, window); what the folder holds already is not done again."""
        starts = range(0, len(windows), PART)
        missing = [i for i in starts if not self._whole(f"{name}-{i:06d}")]
        done = len(starts) - len(missing)
        with progress("Asking the dense model", len(windows), done=done * PART, unit="windows", quiet=quiet) as tick:
            for i in missing:
                values, tokens = [], []
                for ids in windows[i : i + PART, None]:
                    value, token = self._best(logits(ids)[0])
                    values.append(value)
                    tokens.append(token)
                    tick()
                part = {"values": torch.stack(values), "tokens": torch.stack(tokens)}
                if self.folder is None:
                    self._parts[f"{name}-{i:06d}"] = part
                else:
                    write_part(self.folder / f"{name}-{i:06d}.safetensors", part, self.mark)

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:  # (length, vocabulary) to two of (length, top)
        values, tokens = [], []
        for rows in torch.split(logits, ROWS):
            wide = rows.float()
            best, which = wide.topk(min(self.top, wide.shape[-1]), -1)
            values.append((best - wide.logsumexp(-1, keepdim=True)).cpu())
            tokens.append(which.to(torch.int32).cpu())
        return torch.cat(values), torch.cat(tokens)

    def _whole(self, name: str) -> bool:
        if self.folder is None:
            return name in self._parts
        try:
            return set(read_names(self.folder / f"{name}.safetensors", self.mark)[0]) == {"values", "tokens"}
        except TwofoldError:
            return False

    def answer(self, name: str, i: int) -> tuple[Tensor, Tensor]:
        """The log-probabilities (length, top) and tokens (length, top) of one window."""
        part, row = f"{name}-{i // PART * PART:06d}", i % PART
        if self.folder is None:
            return self._parts[part]["values"][row], self._parts[part]["tokens"][row].long()
        with safe_open(self.folder / f"{part}.safetensors", "pt") as file:
            return file.get_slice("values")[row], file.get_slice("tokens")[row].long()


def divergence(
    logits: Tensor,  # (length, vocabulary), of the model that learns
    values: Tensor,  # (length, top), log-probabilities of the teacher's best tokens
    tokens: Tensor,  # (length, top)
) -> Tensor:  # (), the mean over positions, in nats
    """KL(teacher ‖ model) where all but the teacher's best tokens count as one; never above the whole divergence."""
    logits = logits.float()
    values, tokens = values.to(logits.device), tokens.to(logits.device)
    own = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    total = (values.exp() * (values - own)).sum(-1)
    if tokens.shape[-1] < logits.shape[-1]:
        rest, own_rest = _rest(values), _rest(own)
        total = total + rest * (rest.log() - own_rest.log())
    return total.mean()


def _rest(values: Tensor) -> Tensor:
    """The probability that is left for the other tokens; not below what float32 resolves."""
    return (1 - values.exp().sum(-1)).clamp_min(1e-7)
