"""What a run will take: memory and disk from the shapes, time from a short probe of this machine."""

from __future__ import annotations

from contextlib import suppress

import torch

from twofold.calibrate.opened import Opened
from twofold.errors import TwofoldError
from twofold.model.blocks import Chain
from twofold.model.survey import survey
from twofold.model.target import Target
from twofold.model.weights import list_weights
from twofold.planning.plan import EffortTime, Estimate
from twofold.recipe import Recipe
from twofold.recipe.effort import EFFORTS, at_effort, effort_parts
from twofold.refine import REFINEMENTS
from twofold.run.estimate.busy import watch_processors
from twofold.run.estimate.figures import figures_of
from twofold.run.estimate.fit import fit_of, memory_limit
from twofold.run.estimate.memory import memory_of, price_of, states_of
from twofold.run.estimate.probe import probe
from twofold.run.estimate.seconds import read_speed, seconds_of

OF_SAMPLES = (
    "calibrate",
    "recalibrate",
    "sensitivities",
    "refine",
    "texts",
    "measure",
    "samples",
)  # stages that run the model


def estimate_run(opened: Opened, recipe: Recipe, output_bytes: int) -> Estimate:
    """Estimate what a run of a recipe will take: memory and disk from the shapes, time from a probe of some seconds.

    Args:
        opened: the model without weights.
        output_bytes: of the factored checkpoint.

    Raises:
        TwofoldError: if it can't be done in the memory that may be used.
    """
    loaded, limit, task = opened.loaded, memory_limit(recipe), opened.task
    windows = task is None or task.streams
    if not windows:  # a sample has as many positions as the model has, where it says how many
        recipe = recipe.model_copy(
            update={"window": getattr(loaded.model.config, "max_source_positions", recipe.window)}
        )
    blocks = fit_of(opened, recipe, limit).blocks
    targets = list_weights(loaded.model, recipe.include, recipe.exclude).targets
    groups: dict[str, str] = {}
    chain: Chain | None = None
    with suppress(TwofoldError):  # a model that does not run without weights is estimated as one piece
        surveyed = survey(loaded, targets, opened.need_task().example(loaded.model))
        groups, chain = surveyed.groups, surveyed.chain if windows else None
    f = figures_of(loaded, chain, groups, recipe)
    memory = memory_of(f, recipe, blocks)
    with watch_processors() as busy:
        speeds = probe(opened, chain, [t for t in f.block_targets if isinstance(t, Target)], groups, recipe, f.table)
    reading = read_speed(loaded)
    seconds = seconds_of(f, speeds, recipe, blocks, reading)
    if not windows:  # what a sample takes is not known before the data is
        seconds = {stage: value for stage, value in seconds.items() if stage not in OF_SAMPLES}

    def seconds_at(level: Recipe) -> float | None:
        """Return the time of a run at another effort; None if it is not known, or does not fit."""
        try:
            at_once = fit_of(opened, level, limit).blocks
        except TwofoldError:
            return None
        if not windows or (at_once is not None and level.refine):
            return None
        return round(sum(seconds_of(f, speeds, level, at_once, reading).values()), 1)

    levels = [at_effort(recipe, name) for name in EFFORTS]
    work = 4 * sum(min(t.out_features, t.in_features) ** 2 for t in f.targets)  # the bases
    if blocks is None:
        work += int(sum(REFINEMENTS.get(name).disk(price_of(f, recipe), recipe) for name in recipe.refine))
    else:
        work += output_bytes + (states_of(f, recipe, blocks) if recipe.activations == "disk" else 0)
    return Estimate(
        blocks_at_once=blocks,
        peak_memory=int(max(memory.values())),
        memory_limit=int(limit),
        memory={name: int(value) for name, value in memory.items()},
        seconds={name: round(value, 1) for name, value in seconds.items()},
        total_seconds=round(sum(seconds.values()), 1),
        moments_bytes=4 * sum(f.request.values()),
        work_bytes=work,
        output_bytes=output_bytes,
        threads=torch.get_num_threads(),
        others=round(busy.others, 2),
        free_seconds=round(sum(seconds.values()) * busy.shortening, 1) if busy.disturbed else None,
        efforts=[
            EffortTime(effort=str(level.effort), words=effort_parts(level, windows), seconds=seconds_at(level))
            for level in levels
        ],
    )
