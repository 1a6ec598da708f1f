"""Weights that config.json says are one, and whether the files agree: what they hold is what is meant."""

from __future__ import annotations

from typing import Any

import torch

from twofold.checkpoint.shards import Shards
from twofold.checkpoint.ties import part_weight, tied_names
from twofold.model.stored import Stored


def part_by_files(model: Any, stored: Stored, shards: Shards | None) -> None:
    """Make a model's tied weights those that are one in its files, as transformers does when it loads them.

    Two weights that config.json ties are two if the files hold both with different numbers; with the same numbers they are one,
    and the second copy is not used. What the configuration says stays as it is (``checkpoint.ties.settle_ties``).

    Args:
        model: with its weights as transformers loaded them, or without weights.
        stored: what the files hold; a second copy is written down in it.
    """
    for name, source in tied_names(model).items():
        first, second = stored.keys.get(name), stored.keys.get(source)
        if shards is None or first is None or second is None or first == second:
            continue
        if _equal(shards, first, second):
            stored.unused[first] = f"the same numbers as {second}, which is used in its place"
            stored.keys[name] = second
        else:
            part_weight(model, name)
            stored.parted.append(name)


def _equal(shards: Shards, first: str, second: str) -> bool:
    """Say whether two tensors of the files hold the same numbers."""
    if shards.headers[first].shape != shards.headers[second].shape:
        return False
    (_, one), (_, other) = shards.read([first, second])
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))
