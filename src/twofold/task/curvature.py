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

from twofold.task import Curvature
from twofold.task.text.sampled import draw

ROWS = 128  # token positions that are worked on at once
TOP = 256  # most likely tokens that gauss-newton looks at


def stream(seed: int, batch: int) -> torch.Generator:
    """The draws of one batch, which do not depend on those of others."""
    return torch.Generator().manual_seed(seed * 1_000_003 + batch)


def loss_gradient(
    logits: Tensor,  # (batch, length, vocabulary)
    ids: Tensor,  # (batch, length), that the logits are of
    generator: torch.Generator,
    curvature: Curvature = "sampled",
) -> Tensor:  # the shape of the logits
    """The random gradient at the logits, summed over positions, whose second moment is the curvature."""
    if curvature == "gauss-newton":
        return _probe(logits, generator)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    probabilities = torch.softmax(logits.detach().to(wide), -1)
    if curvature == "empirical":
        nearest = probabilities[:, :-1]
        nearest.scatter_add_(2, ids[:, 1:, None].to(nearest.device), -torch.ones_like(nearest[..., :1]))
        probabilities[:, -1] = 0  # what follows the last token is not known
        return probabilities.to(logits.dtype)
    flat = probabilities.view(-1, probabilities.shape[-1])
    for rows in torch.split(flat, ROWS):
        labels = draw(rows if rows.device.type == "cpu" else rows.cpu(), generator).to(rows.device)
        rows[torch.arange(len(rows), device=rows.device), labels] -= 1
    return probabilities.to(logits.dtype)


def _probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A random vector with the covariance diag(p) − p pᵀ over the most likely tokens, for every position."""
    found = torch.zeros_like(logits)
    flat = found.view(-1, logits.shape[-1])
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for rows, out in zip(torch.split(logits.detach().view_as(flat), ROWS), torch.split(flat, ROWS), strict=True):
        likely, tokens = rows.to(wide).topk(min(TOP, rows.shape[-1]), -1)
        roots = torch.softmax(likely, -1).sqrt()
        signs = torch.randint(0, 2, roots.shape, generator=generator).to(roots) * 2 - 1
        out.scatter_(1, tokens, (roots * (signs - roots * (roots * signs).sum(-1, keepdim=True))).to(out.dtype))
    return found
