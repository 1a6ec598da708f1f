"""Where the units of a structure stand among the rows or columns of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from twofold.model.structure import Structure


def head_rows(head: int, dim: int) -> slice:
    """Return the rows of one head."""
    return slice(head * dim, (head + 1) * dim)


def unit_dims(structure: Structure) -> Tensor:  # (units, 1) or (units, 2)
    """Return the dimensions of a head that each unit is: itself, or the two that rotary embeddings turn together."""
    units = torch.arange(structure.units)
    if structure.pairing == "halves":  # (i, i + d/2): Llama
        return torch.stack([units, units + structure.units], 1)
    if structure.pairing == "neighbours":  # (2i, 2i + 1): GPT-J
        return torch.stack([2 * units, 2 * units + 1], 1)
    return units[:, None]


def unit_rows(
    structure: Structure,
    units: Tensor,  # (key heads, count), of each key head
    heads: int,  # of the weight: key heads or query heads; the latter follow the key head that they share
) -> Tensor:  # (heads · count · 1 or 2,), ascending
    """Return the rows of a weight that the chosen units of every head are."""
    dims, shared = unit_dims(structure), heads // structure.key_heads
    rows = [head * dims.numel() + dims[units[head // shared]].reshape(-1).sort().values for head in range(heads)]
    return torch.cat(rows)


def even_shares(numbers: int, parts: int) -> list[int]:
    """Share a number out in whole parts that differ by one at the most."""
    each, over = divmod(numbers, parts)
    return [each + (i < over) for i in range(parts)]
