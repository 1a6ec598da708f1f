"""Classes kept as the most likely few of a prediction, and the divergence from them with its gradient.

The other classes count as one, so that what is computed is never above the whole divergence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 256  # predictions whose probabilities are held at once


def most_likely(
    logits: Tensor,  # (predictions, classes)
    top: int,
) -> tuple[Tensor, Tensor]:  # (predictions, top) in float32, and (predictions, top) in int32
    """Return the log-probabilities of the most likely classes and which they are, on the processor."""
    values, classes = [], []
    for rows in torch.split(logits, ROWS):
        wide = rows.float()
        best, which = wide.topk(min(top, wide.shape[-1]), -1)
        values.append((best - wide.logsumexp(-1, keepdim=True)).cpu())
        classes.append(which.to(torch.int32).cpu())
    return torch.cat(values), torch.cat(classes)


class _Divergence(torch.autograd.Function):
    """The loss with its gradient, taken a few rows at a time, so that the logits of all rows are never kept."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, values: Tensor, classes: Tensor, labels: Tensor, share: float, head: nn.Linear | None
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
            which, label = classes[rows].to(device), labels[rows].to(device)
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
            # By a logit z of the probability p: p - q among the best classes, p (1 - rest/own rest) among the others,
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
    states: Tensor,  # (predictions, classes), logits of the model that learns; or (predictions, width), what its head is given
    values: Tensor,  # (predictions, top), log-probabilities of the teacher's most likely classes
    classes: Tensor,  # (predictions, top)
    *,
    labels: Tensor | None = None,  # (predictions,), what is right; -1 where that is not known
    share: float = 0.0,
    head: nn.Linear | None = None,
) -> Tensor:  # (), the mean over predictions, in nats
    """Return KL(teacher ‖ model) where all but the teacher's most likely classes count as one.

    Args:
        share: of the cross-entropy of the labels in what is returned; the divergence has the rest.
        head: the layer that makes logits of states; its weight gets no gradient. It saves the memory of the logits.
    """
    if labels is None:
        labels = torch.full((len(states),), -1, device=states.device)
    return _Divergence.apply(states, values, classes.long(), labels, share, head)  # type: ignore[no-untyped-call, no-any-return]


def _rest(values: Tensor) -> Tensor:
    """Return the probability that is left for the other classes; not below what float32 resolves."""
    return (1 - values.exp().sum(-1)).clamp_min(1e-7)
