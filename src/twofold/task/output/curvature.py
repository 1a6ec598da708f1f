"""How the curvature of the loss is estimated from one backward pass: the gradient at the logits, of which G is the second moment.

For the next-token probabilities p the second derivative of the loss in the logits is H = diag(p) − p pᵀ. Each estimate starts the
backward pass with a random v per position; what arrives at a layer is g, and E[g gᵀ] estimates its block of JᵀHJ.

    sampled       v = p − onehot(y), y drawn from p. E[v vᵀ] = H: the true Fisher information. The default.
    gauss-newton  v = S(ε − s (s·ε)), s = √p of the most likely tokens, S = diag(s), ε random signs. E[v vᵀ] = H over those
                  tokens: no position is silent because its likely label came, so it scatters less from token to token.
    empirical     v = p − onehot(text's own next token): the empirical Fisher information, which is H only for a model that
                  predicts the text as well as it can be predicted (Kunstner et al. 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from twofold.task.output import Curvature, need_labels

ROWS = 128  # token positions that are worked on at once
TOP = 256  # most likely tokens that gauss-newton looks at


def draw(
    probabilities: Tensor,  # (rows, classes)
    generator: torch.Generator,
) -> Tensor:  # (rows,), int64
    """Draw one class a row by inverting the cumulative distribution (many times faster here than torch.multinomial)."""
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand(len(cumulative), 1, generator=generator).to(cumulative)
    classes = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    return classes[:, 0].clamp_max(probabilities.shape[-1] - 1)


def stream(seed: int, batch: int) -> torch.Generator:
    """Return the draws of one batch, which do not depend on those of others."""
    return torch.Generator().manual_seed(seed * 1_000_003 + batch)


def loss_gradient(
    logits: Tensor,  # (predictions, classes)
    labels: Tensor | None,  # (predictions,), −1 where there is none
    generator: torch.Generator,
    curvature: Curvature = "sampled",
) -> Tensor:  # (predictions, classes)
    """Return the random gradient at the logits, summed over predictions, whose second moment is the curvature."""
    if curvature == "gauss-newton":
        return _probe(logits, generator)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    probabilities = torch.softmax(logits.detach().to(wide), -1)
    if curvature == "empirical":
        known = need_labels(labels, "curvature=empirical").to(probabilities.device)
        probabilities.scatter_add_(1, known.clamp_min(0)[:, None], -torch.ones_like(probabilities[:, :1]))
        probabilities[known < 0] = 0  # what is right is not known
        return probabilities.to(logits.dtype)
    for rows in torch.split(probabilities, ROWS):
        drawn = draw(rows if rows.device.type == "cpu" else rows.cpu(), generator).to(rows.device)
        rows[torch.arange(len(rows), device=rows.device), drawn] -= 1
    return probabilities.to(logits.dtype)


def _probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random vector with the covariance diag(p) − p pᵀ over the most likely tokens, for every position."""
    vectors = torch.zeros_like(logits)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for rows, out in zip(torch.split(logits.detach(), ROWS), torch.split(vectors, ROWS), strict=True):
        likely, tokens = rows.to(wide).topk(min(TOP, rows.shape[-1]), -1)
        roots = torch.softmax(likely, -1).sqrt()
        signs = torch.randint(0, 2, roots.shape, generator=generator).to(roots) * 2 - 1
        out.scatter_(1, tokens, (roots * (signs - roots * (roots * signs).sum(-1, keepdim=True))).to(out.dtype))
    return vectors
