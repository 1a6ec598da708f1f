"""What a model wrote to be calibrated on, kept for another run: token ids in the cache, by what they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.host.cache import cache_folder
from twofold.host.files import write_whole
from twofold.host.progress import say


def kept_ids(mark: str, make: Callable[[], Tensor], what: str) -> Tensor:
    """Return the ids that a mark stands for: those of an earlier run, or new ones.

    If the disk does not take them, this run goes on without.

    Args:
        what: they are, in words.
    """
    path = cache_folder() / "samples" / f"{hashlib.sha256(mark.encode()).hexdigest()[:24]}.safetensors"
    ids = _before(path)
    if ids is None:
        ids = make().contiguous()
        try:
            write_whole(path, lambda temporary: save_file({"ids": ids}, temporary))
        except TwofoldError as error:
            say(f"{what} are not kept for another run: {error}")
    return ids


def _before(path: Path) -> Tensor | None:
    """Return the ids of an earlier run; None if there are none that can be read."""
    try:
        ids: Tensor = load_file(path)["ids"]
        return ids
    except (SafetensorError, OSError, KeyError):
        return None
