"""Draws from a distribution over classes."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(
    probabilities: Tensor,  # (rows, vocabulary)
    generator: torch.Generator,
) -> Tensor:  # (rows,), int64
    """Draw one token a row by inverting the cumulative distribution (many times faster here than torch.multinomial)."""
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand(len(cumulative), 1, generator=generator).to(cumulative)
    picked = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    return picked[:, 0].clamp_max(probabilities.shape[-1] - 1)
