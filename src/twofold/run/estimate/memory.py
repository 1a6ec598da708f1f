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
    batches = ceil(recipe.all_tokens / speeds.batch)
    return Price(f, speeds, batches, recipe.window, recipe.keep or 1.0)


def memory_of(f: Figures, recipe: Recipe, blocks: int | None) -> dict[str, float]:
    """The peak memory of each stage, in bytes, with some blocks in memory at once, or all (None)."""
    objective = OBJECTIVES.get(recipe.objective)
    batch = recipe.batch_size * recipe.window
    window = min(1024, recipe.window)
    through = sum(t.in_features + t.out_features for t in f.block_targets)  # numbers a token of one block
    at_once = f.blocks or 1 if blocks is None else min(blocks, f.blocks or 1)
    wide_table = f.table * f.element > LARGE and f.stored < f.element
    table = f.table * (f.stored if wide_table else f.element) if blocks is not None else 0
    part = PART * (f.table // max(f.vocabulary, 1)) * f.element if wide_table and blocks is not None else 0
    stages: dict[str, float] = {}
    weights = f.numbers * f.element if blocks is None else (f.block * at_once + f.outside) * f.element
    states = 0.0
    if blocks is not None and recipe.activations == "memory" and objective.needs:
        kept = ceil(f.blocks / at_once) if f.backward else 2
        states = kept * recipe.all_tokens * (f.table // max(f.vocabulary, 1)) * f.element
    mapped = 0 if blocks is None else f.block * at_once * f.stored
    acting = batch * through * f.element * (SAVED * at_once if f.backward else 0.7)
    logits = batch * f.vocabulary * 4
    # The last stretch collects both at once.
    moments = (sum(f.request.values()) if blocks is None else sum(f.block_request.values()) * at_once) * 4
    stages["load"] = LIBRARIES + weights + (f.numbers * f.stored if blocks is None else mapped)
    if objective.needs:
        head = table + part + 3 * logits if f.backward else table
        stages["calibrate"] = (
            LIBRARIES
            + weights
            + states
            + moments
            + max(acting + (head if blocks is None or f.backward else 0), mapped, table)
        )
    side = max((min(t.out_features, t.in_features) for t in f.targets), default=0)
    size = max((t.size for t in f.targets), default=0)
    size *= objective.together(recipe)
    together = max(1, min(BATCH, BATCH_NUMBERS // max(side, 1) ** 2))
    unit = (
        sum(min(t.out_features, t.in_features) ** 2 for t in f.block_targets) * 4 * (4 if blocks is None else at_once)
    )
    work = together * (side * side * 8 * 9 + size * 8)
    stages["decompose"] = LIBRARIES + weights + unit * 2 + work
    factors = f.numbers * f.element if blocks is None else f.block * at_once * f.stored + table
    stages["factorize"] = LIBRARIES + weights + factors + side * side * 8 * 6 + size * 8 * 3
    if recipe.refine and blocks is None:
        price = price_of(f, recipe)
        window_acting = recipe.window * through * f.element * SAVED * at_once
        held = max(REFINEMENTS.get(name).memory(price, recipe) for name in recipe.refine)
        logits_held = 3 * recipe.window * f.vocabulary * 4
        stages["refine"] = LIBRARIES + weights + price.trained * f.element + held + window_acting + logits_held
    if recipe.eval_windows:
        stages["measure"] = (
            LIBRARIES + weights + (factors if blocks is None else table + part) + window * f.vocabulary * 4 * 4
        )
    return stages
