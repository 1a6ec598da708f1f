"""The memory that a run may use, and how a model fits it: whole, or some blocks at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from twofold.calibrate.opened import Opened
from twofold.errors import TwofoldError
from twofold.host import processes
from twofold.model.blocks import Chain
from twofold.model.load import load_skeleton
from twofold.model.settings import Loading
from twofold.model.survey import survey
from twofold.model.weights import list_weights
from twofold.recipe import Recipe
from twofold.run.estimate.figures import figures_of
from twofold.run.estimate.memory import memory_of
from twofold.settings.sizes import parse_bytes

PART_OF_FREE = 0.85  # of the memory that is free, what is used unless a limit is named


@dataclass(frozen=True)
class Fit:
    """How a model fits, in bytes of peak memory."""

    resident: float  # all in memory
    limit: float
    streamed: float = 0.0  # some blocks at a time
    blocks: int | None = None  # how many at a time; None: all in memory
    chain: Chain | None = None


def choose_fit(recipe: Recipe) -> Fit | None:
    """Choose how to work on a model: in memory if it fits, else by as many blocks at a time as fit.

    Returns:
        None for a model whose size can't be told before it is loaded (a GGUF file).

    Raises:
        TwofoldError: if not even one block fits, or the model can't be worked through by blocks.
    """
    limit = processes.least(memory_limit(recipe))  # all processes must choose the same
    if recipe.model.endswith(".gguf") or recipe.stream == "never":
        return None
    how = recipe.model_dump(include={"revision", "trust_remote_code", "dequantize"})
    loaded = load_skeleton(recipe.model, **how)
    return fit_of(Opened(loaded, named=recipe.task), recipe, limit)


def fit_of(opened: Opened, recipe: Recipe, limit: float) -> Fit:
    """Choose how to work on a model that is opened without weights.

    Raises:
        TwofoldError: if not even one block fits, or the model can't be worked through by blocks.
    """
    loaded = opened.loaded
    resident = max(memory_of(figures_of(loaded, None, {}, recipe), recipe, None).values())
    if recipe.stream == "never" or (recipe.stream == "auto" and resident * 1.5 < limit):  # no need to look closer
        return Fit(resident, limit)
    surveyed, reason = None, "it is factorized already"
    if loaded.dequantized:
        reason = f"it is {loaded.dequantized}, and `dequantize` works on the whole model in memory"
    elif getattr(loaded.model.config, "quantization_config", None) is None:
        reason = "its blocks do not simply follow one another"
        try:
            targets = list_weights(loaded.model, recipe.include, recipe.exclude).targets
            task = opened.need_task("worked through block by block")
            if not task.streams:
                raise TwofoldError(f"{task.name} is worked on as a whole, since its samples have many shapes")
            surveyed = survey(loaded, targets, task.example(loaded.model))
            if len(surveyed.stacks) > 1:
                reason = f"it runs more than one stack of blocks ({', '.join(surveyed.stacks)})"
        except TwofoldError as error:
            reason = str(error)
    chain, groups = (None, {}) if surveyed is None else (surveyed.chain, surveyed.groups)
    figures = figures_of(loaded, chain, groups, recipe)
    resident = max(memory_of(figures, recipe, None).values())
    if resident <= limit and recipe.stream == "auto":
        return Fit(resident, limit)
    if chain is None:
        obstacle = f"it can't be worked through block by block: {reason}"
        if resident <= limit:
            raise TwofoldError(
                f"`stream=always` asks for {recipe.model} block by block, and {obstacle}; leave `stream` out"
            )
        remedy = "leave `stream` out, and " if recipe.stream == "always" else ""
        raise TwofoldError(
            f"{recipe.model} takes about {resident / 1e9:.1f} GB and {limit / 1e9:.1f} GB may be used, and {obstacle}; "
            f"{remedy}give it more memory with `memory`"
        )
    fitting = [n for n in range(1, len(chain) + 1) if max(memory_of(figures, recipe, n).values()) <= limit]
    if not fitting:
        stages = memory_of(figures, recipe, 1)
        stage = max(stages, key=lambda name: stages[name])
        raise TwofoldError(
            f"{recipe.model} can't be worked on with {limit / 1e9:.1f} GB: one block at a time takes about "
            f"{stages[stage] / 1e9:.1f} GB (to {stage}); give it more with `memory`, or try `window={max(recipe.window // 2, 2)}`"
        )
    blocks = 1 if recipe.stream == "always" and recipe.memory is None else fitting[-1]
    return Fit(resident, limit, max(memory_of(figures, recipe, blocks).values()), blocks, chain)


def memory_limit(recipe: Loading) -> float:
    """Return how many bytes may be used.

    Raises:
        TwofoldError: if ``memory`` is not a number of bytes.
    """
    if recipe.memory is not None:
        return parse_bytes(recipe.memory, "memory")
    if recipe.device.startswith("cuda") or (recipe.device == "auto" and torch.cuda.is_available()):
        return torch.cuda.mem_get_info()[0] * PART_OF_FREE
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
    return float(min(psutil.virtual_memory().available, _contained()) * PART_OF_FREE / max(sharing, 1))


def _contained() -> float:
    """Return what a container or a limit of this process (ulimit) leaves of the memory, infinite if there is none."""
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
