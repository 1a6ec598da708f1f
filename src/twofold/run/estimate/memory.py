"""The peak memory of a run, stage by stage: a sum of what it holds at once, so it says too how many blocks of a model fit."""

from __future__ import annotations

from math import ceil

from twofold.decompose.decompose import BATCH, BATCH_NUMBERS
from twofold.model.streamed import LARGE, PART
from twofold.objectives import OBJECTIVES
from twofold.recipe import Recipe
from twofold.refine import REFINEMENTS
from twofold.settings.price import NO_SPEEDS, Figures, Price, Speeds

LIBRARIES = 420_000_000  # bytes of a process that has loaded torch and transformers and nothing else
SAVED = 1.4  # bytes of a forward pass that are kept for the backward pass, over those of the linear layers' inputs and outputs


def price_of(f: Figures, recipe: Recipe, speeds: Speeds = NO_SPEEDS) -> Price:
    """Return what the price of a method is made of."""
    return Price(f, speeds, ceil(recipe.all_tokens / speeds.batch), recipe.window, recipe.keep or 1.0)


def states_of(f: Figures, recipe: Recipe, blocks: int) -> int:
    """Return the bytes of the hidden states that a calibration keeps between its stretches of some blocks."""
    count = ceil(f.blocks / blocks) if f.backward else 2
    return count * recipe.all_tokens * f.width * f.element


def memory_of(f: Figures, recipe: Recipe, blocks: int | None) -> dict[str, float]:
    """Return the peak memory of each stage, in bytes, with some blocks in memory at once, or all (None)."""
    objective = OBJECTIVES.get(recipe.objective)
    batch = recipe.batch_size * recipe.window
    through = sum(t.in_features + t.out_features for t in f.block_targets)  # numbers a token of one block
    if blocks is None:
        at_once, weights, loading = f.blocks or 1, f.numbers * f.element, f.numbers * f.stored
        mapped = table = part = states = 0
        moments, bases_at_once = sum(f.request.values()) * 4, 4
        factors = measuring = weights
    else:
        at_once = min(blocks, f.blocks or 1)
        weights = (f.block * at_once + f.outside) * f.element
        wide_table = f.table * f.element > LARGE and f.stored < f.element
        table = f.table * (f.stored if wide_table else f.element)
        part = PART * f.width * f.element if wide_table else 0
        states = states_of(f, recipe, at_once) if recipe.activations == "memory" else 0
        loading = mapped = f.block * at_once * f.stored
        # The last stretch collects the moments of both directions at once.
        moments, bases_at_once = sum(f.block_request.values()) * at_once * 4, at_once
        factors, measuring = mapped + table, table + part
    base = LIBRARIES + weights
    stages: dict[str, float] = {"load": base + loading}
    if objective.needs:
        acting = batch * through * f.element * (SAVED * at_once if f.backward else 0.7)
        head = table + part + 3 * batch * f.vocabulary * 4 if f.backward else 0
        stages["calibrate"] = base + states + moments + max(acting + head, mapped, table)
    side = max((min(t.out_features, t.in_features) for t in f.targets), default=0)
    size = max((t.size for t in f.targets), default=0) * objective.together(recipe)
    together = max(1, min(BATCH, BATCH_NUMBERS // max(side, 1) ** 2))
    bases = sum(min(t.out_features, t.in_features) ** 2 for t in f.block_targets) * 4 * bases_at_once
    stages["decompose"] = base + bases * 2 + together * (side * side * 8 * 9 + size * 8)
    stages["factorize"] = base + factors + side * side * 8 * 6 + size * 8 * 3
    if recipe.refine and blocks is None:
        price = price_of(f, recipe)
        acting = recipe.window * through * f.element * SAVED * at_once
        training = max(REFINEMENTS.get(name).memory(price, recipe) for name in recipe.refine)
        logits = 3 * recipe.window * f.vocabulary * 4
        stages["refine"] = base + price.trained * f.element + training + acting + logits
    if recipe.eval_windows:
        stages["measure"] = base + measuring + min(1024, recipe.window) * f.vocabulary * 4 * 4
    return stages
