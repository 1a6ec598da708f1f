"""How a model can be worked on: whole in memory, or some blocks at a time."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.calibrate.opened import Opened
from twofold.errors import TwofoldError
from twofold.host import processes
from twofold.model.blocks import Chain
from twofold.model.load import load_skeleton
from twofold.model.survey import survey
from twofold.model.weights import list_weights
from twofold.recipe import Recipe
from twofold.run.estimate.figures import figures_of
from twofold.run.estimate.limit import memory_limit
from twofold.run.estimate.memory import memory_of


@dataclass(frozen=True)
class Way:
    """How a model can be worked on, in bytes of peak memory."""

    resident: float  # all in memory
    streamed: float  # some blocks at a time
    limit: float
    blocks: int | None  # how many at a time; None: all in memory
    chain: Chain


def choose_way(recipe: Recipe) -> Way | None:
    """Choose how to work on a model: in memory if it fits, else by as many blocks at a time as fit.

    Returns:
        None for a model whose size can't be told before it is loaded (a GGUF file).

    Raises:
        TwofoldError: if not even one block fits, or the model can't be worked through by blocks.
    """
    limit = processes.least(memory_limit(recipe))  # all processes must choose the same
    if recipe.model.endswith(".gguf") or recipe.stream == "never":
        return None
    loaded = load_skeleton(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    return way_of(Opened(loaded, named=recipe.task), recipe, limit)


def way_of(opened: Opened, recipe: Recipe, limit: float) -> Way:
    """Choose how to work on a model without weights that is at hand.

    Raises:
        TwofoldError: if not even one block fits, or the model can't be worked through by blocks.
    """
    loaded = opened.loaded
    rough = figures_of(loaded, None, {}, recipe)
    whole = memory_of(rough, recipe, None)
    nothing = Chain((), False)
    sure = recipe.stream == "never" or (recipe.stream == "auto" and max(whole.values()) * 1.5 < limit)
    if sure:  # no need to look closer
        return Way(max(whole.values()), 0.0, limit, None, nothing)
    foreign = getattr(loaded.model.config, "quantization_config", None) is not None
    found = None
    reason = "it is quantized or factorized already" if foreign else "its blocks do not simply follow one another"
    if not foreign:
        try:
            targets = list_weights(loaded.model, recipe.include, recipe.exclude).targets
            found = survey(loaded, targets, opened.need_task("worked through block by block").example(loaded.model))
        except TwofoldError as error:
            reason = str(error)
    chain = found.chain if found is not None else None
    f = figures_of(loaded, chain, found.groups if found is not None else {}, recipe)
    whole = memory_of(f, recipe, None)
    resident = max(whole.values())
    if resident <= limit and recipe.stream == "auto":
        return Way(resident, 0.0, limit, None, chain or nothing)
    if chain is None:
        raise TwofoldError(
            f"{recipe.model} takes about {resident / 1e9:.1f} GB and {limit / 1e9:.1f} GB may be used, and it can't be worked "
            f"through block by block: {reason}; give it more memory with `memory`"
        )
    fitting = [n for n in range(1, len(chain) + 1) if max(memory_of(f, recipe, n).values()) <= limit]
    if not fitting:
        least = memory_of(f, recipe, 1)
        stage = max(least, key=lambda name: least[name])
        raise TwofoldError(
            f"{recipe.model} can't be worked on with {limit / 1e9:.1f} GB: one block at a time takes about "
            f"{least[stage] / 1e9:.1f} GB (to {stage}); give it more with `memory`, or try `window={max(recipe.window // 2, 2)}`"
        )
    blocks = 1 if recipe.stream == "always" and recipe.memory is None else fitting[-1]
    return Way(resident, max(memory_of(f, recipe, blocks).values()), limit, blocks, chain)
