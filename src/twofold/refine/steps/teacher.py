"""What the dense model predicts at each position: its most likely tokens, and how much is left for the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from twofold.host.parts import Parts, take_part, write_part
from twofold.host.progress import progress
from twofold.task import Batch, Samples

TOP = 128  # tokens that are kept at a position
PART = 16  # samples in a file
TOGETHER = 1024  # tokens that go through a model at once: enough to keep two threads busy
ROWS = 256  # positions whose probabilities are held at once


def at_once(samples: Samples) -> int:
    """Return how many samples go through a model together."""
    return max(TOGETHER // samples.units(0, 1), 1)


class Teacher:
    """The log-probabilities of the ``top`` most likely tokens at each position of some samples, on disk or in memory.

    Eight bytes a token and position: 65,536 positions take 67 MB.
    """

    def __init__(self, folder: Path | None, mark: str, top: int = TOP) -> None:
        self.folder, self.top = folder, top
        self.mark = hashlib.sha256(f"{mark} {top}".encode()).hexdigest()
        self._parts: dict[int, Mapping[str, Tensor]] = {}  # by their first sample

    @torch.no_grad()
    def ask(self, outputs: Callable[[Batch], Tensor], samples: Samples, *, quiet: bool = False) -> None:
        """Run the dense model over samples; what the folder holds already is not done again."""
        paths = {i: self.folder and self.folder / f"samples-{i:06d}.safetensors" for i in range(0, len(samples), PART)}
        for i, path in paths.items():
            if part := take_part(path, self.mark):
                self._parts[i] = part[0]
        missing = [i for i in paths if i not in self._parts]
        done = len(self._parts) * PART
        with progress("Asking the dense model", len(samples), done=done, unit="windows", quiet=quiet) as tick:
            for i in missing:
                answers: dict[str, Tensor] = {}
                some = samples[i : i + PART]
                for first, last in some.spans(at_once(samples)):
                    each = outputs(some.batch(first, last)).chunk(last - first)  # a batch has samples of one shape
                    for row, logits in zip(range(first, last), each, strict=True):
                        answers[f"values/{row}"], answers[f"tokens/{row}"] = self._best(logits)
                        tick()
                path = paths[i]
                if path is not None:
                    write_part(path, answers, self.mark)
                self._parts[i] = answers if path is None else Parts(dict.fromkeys(answers, path))

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:  # (predictions, classes) to two of (predictions, top)
        values, tokens = [], []
        for rows in torch.split(logits, ROWS):
            wide = rows.float()
            best, which = wide.topk(min(self.top, wide.shape[-1]), -1)
            values.append((best - wide.logsumexp(-1, keepdim=True)).cpu())
            tokens.append(which.to(torch.int32).cpu())
        return torch.cat(values), torch.cat(tokens)

    def answer(self, i: int) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities (predictions, top) and classes (predictions, top) of one sample."""
        part, row = self._parts[i // PART * PART], i % PART
        return part[f"values/{row}"], part[f"tokens/{row}"].long()


class _Divergence(torch.autograd.Function):
    """The loss with its gradient, taken a few rows at a time, so that the logits of all rows are never kept."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, values: Tensor, tokens: Tensor, labels: Tensor, share: float, head: nn.Linear | None
    ) -> Tensor:
        learns = ctx.needs_input_grad[0]
        gradient = torch.empty_like(states) if learns else states.new_empty(0)
        total = torch.zeros((), dtype=torch.float64, device="cpu" if states.device.type == "mps" else states.device)
        labelled = max(int((labels >= 0).sum()), 1)
        for start in range(0, len(states), ROWS):
            rows = slice(start, start + ROWS)
            some = states[rows] if head is None else head(states[rows].to(head.weight.dtype))
            # A copy of what is given, since it is worked on in place.
            logits = some.to(torch.promote_types(some.dtype, torch.float32), copy=head is None)
            del some
            known, device = values[rows].to(logits), logits.device
            which, label = tokens[rows].to(device), labels[rows].to(device)
            hard = (label >= 0).to(logits) * (share * len(states) / labelled)  # (rows,)
            label = label.clamp_min(0)[:, None]
            best, own_label = logits.gather(-1, which), logits.gather(-1, label)
            highest = logits.amax(-1, keepdim=True)
            logits.sub_(highest).exp_()
            summed = logits.sum(-1, keepdim=True)
            whole = highest + summed.log()
            own = best - whole
            likely = known.exp()
            each = (1 - share) * (likely * (known - own)).sum(-1) + hard * (whole - own_label)[:, 0]
            others: Tensor | float = 0.0
            if which.shape[-1] < logits.shape[-1]:
                rest, own_rest = _rest(known), _rest(own)
                each += (1 - share) * rest * (rest.log() - own_rest.log())
                others = rest / own_rest
            total += each.sum().to(total)
            if not learns:
                del logits
                continue
            # By a logit z of the probability p: p - q among the best tokens, p (1 - rest/own rest) among the others,
            # and p - 1 or p of the label's share.
            logits.mul_(((1 - share) * (1 - others) + hard)[:, None] / summed)
            logits.scatter_(-1, which, (1 - share) * (own.exp() - likely) + hard[:, None] * own.exp())
            logits.scatter_add_(-1, label, -hard[:, None])
            gradient[rows] = logits if head is None else logits.to(head.weight.dtype) @ head.weight
            del logits  # before the next are made
        ctx.save_for_backward(gradient)
        return (total / len(states)).to(torch.promote_types(states.dtype, torch.float32)).to(states.device)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (own,) = ctx.saved_tensors
        return own * (gradient / len(own)).to(own), None, None, None, None, None


def divergence(
    states: Tensor,  # (positions, vocabulary), logits of the model that learns; or (positions, width), what its head is given
    values: Tensor,  # (positions, top), log-probabilities of the teacher's best tokens
    tokens: Tensor,  # (positions, top)
    *,
    labels: Tensor | None = None,  # (positions,), the tokens that follow; -1 where there is none
    share: float = 0.0,
    head: nn.Linear | None = None,
) -> Tensor:  # (), the mean over positions, in nats
    """Return KL(teacher ‖ model) where all but the teacher's best tokens count as one; never above the whole divergence.

    Args:
        share: of the cross-entropy of the labels in what is returned; the divergence has the rest.
        head: the layer that makes logits of states; its weight gets no gradient. It saves the memory of the logits.
    """
    if labels is None:
        labels = torch.full((len(states),), -1, device=states.device)
    return _Divergence.apply(states, values, tokens, labels, share, head)  # type: ignore[no-untyped-call, no-any-return]


def _rest(values: Tensor) -> Tensor:
    """Return the probability that is left for the other tokens; not below what float32 resolves."""
    return (1 - values.exp().sum(-1)).clamp_min(1e-7)
