"""How much memory a run may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from twofold.errors import TwofoldError
from twofold.model.settings import Loading
from twofold.settings.sizes import parse_budget

PART_OF_FREE = 0.85  # of the memory that is free, what is used unless a limit is named


def memory_limit(recipe: Loading) -> float:
    """How many bytes may be used.

    Raises:
        TwofoldError: if ``memory`` is no number of bytes.
    """
    if recipe.memory is not None:
        amount, unit = parse_budget(recipe.memory)
        if unit != "bytes":
            raise TwofoldError(f"`memory={recipe.memory}` is not understood: give bytes, as in `memory=6GB`")
        return amount
    if recipe.device.startswith("cuda") or (recipe.device == "auto" and torch.cuda.is_available()):
        return torch.cuda.mem_get_info()[0] * PART_OF_FREE
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share this machine's memory
    return float(min(psutil.virtual_memory().available, _contained()) * PART_OF_FREE / max(here, 1))


def _contained() -> float:
    """What a container or a limit of this process (ulimit) leaves of the memory, infinite if there is none."""
    left = float("inf")
    used = psutil.Process().memory_info()
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    with suppress(ImportError, OSError, ValueError):
        import resource

        for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
            soft, _ = resource.getrlimit(kind)
            if soft != resource.RLIM_INFINITY:
                # The address space of the libraries counts against the limit, but takes little memory.
                left = min(left, max(float(soft - used.vms + used.rss), 0.0))
    return left
