"""Refinements one after another on one model: what can't be done is refused before any work, what does harm is taken back."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from twofold.host.progress import say
from twofold.nn.places import hold_bases, replace_module
from twofold.refine import REFINEMENTS, Refined, Stages, kind_of
from twofold.refine.steps.job import Job

if TYPE_CHECKING:
    from twofold.factor.prepared import Prepared

MANY = 2000  # trained numbers for each calibration token: twice what the measured runs had (docs/experiments.md)


def refine(
    prepared: Prepared,
    replaced: dict[str, nn.Module],
    recipe: Stages,
    *,
    folder: Path | None = None,
    quiet: bool = False,
) -> list[Refined]:
    """Better the factors of a model in memory, by each of the recipe's refinements in turn.

    One that makes the model worse on held-out text is taken back.

    Args:
        replaced: the dense layers that the factored ones took the place of.
        folder: where what took long is kept, so that a killed run goes on from it; in memory if it is None.
    """
    data, plan = prepared.data, prepared.plan
    if not recipe.refine or not replaced:
        return []
    assert data is not None
    began = time.monotonic()
    model = prepared.loaded.model
    # Not the losses, which another number of threads rounds otherwise.
    losses = {"predicted_loss", "total_loss", "measured_loss"}
    model_of = plan.model_dump_json(exclude={"notes": True, "entries": {"__all__": losses}})
    # What the quality is measured on is not looked at before.
    held_out = data.to_stop(recipe.eval_windows) if recipe.eval_text is None else data.held_out
    brought = [settings for name in recipe.refine if (settings := REFINEMENTS.get(name).settings) is not None]
    own = sorted(recipe.model_dump_json(include=set(settings.model_fields)) for settings in brought)
    sha256 = hashlib.sha256(model_of.encode()).hexdigest()
    belongs = f"{prepared.spectra.mark} {sha256} {data.samples.sha256} {held_out.sha256} {recipe.minutes} {own}"
    # What a refinement begins from depends on how those before it were asked to work.
    before_it = recipe.model_dump_json(
        include={name for name in type(recipe).model_fields if name.startswith("refine_")}
    )
    plan.notes += _warnings(prepared, recipe, len(held_out), quiet)
    task = prepared.opened.need_task()
    job = Job(
        prepared.loaded, replaced, plan, prepared.moments, prepared.objective, data.samples, held_out, task, recipe
    )
    refinements: list[Refined] = []
    for i, name in enumerate(recipe.refine):
        seconds = None
        if recipe.minutes is not None:
            seconds = max(60 * recipe.minutes - (time.monotonic() - began), 1.0) / (len(recipe.refine) - i)
        own_folder = folder / f"{i}-{name}" if folder is not None else None
        mark = f"{belongs} {recipe.refine[: i + 1]} {before_it if i else ''}"
        # In one call, so that layers that share a basis share its copy.
        before = copy.deepcopy({name: model.get_submodule(name) for name in replaced})
        entries, notes = list(plan.entries), list(plan.notes)
        refined = REFINEMENTS.get(name).run(replace(job, seconds=seconds, folder=own_folder, mark=mark, quiet=quiet))
        if not math.isfinite(refined.loss_after) or refined.loss_after > refined.loss_before:
            for place, module in before.items():
                replace_module(model, place, module)
            hold_bases(model)
            plan.entries[:], plan.notes[:] = entries, notes
            refined = refined.model_copy(update={"ended": f"{refined.ended}; it was taken back, since it did harm"})
            if not quiet:
                say(refined.words)
        refinements.append(refined)
    return refinements


def _warnings(prepared: Prepared, recipe: Stages, held_out: int, quiet: bool) -> list[str]:
    """Return what a reader should know before a training: too few tokens, or none to stop on."""
    assert prepared.data is not None
    samples, units = prepared.data.samples, prepared.data.units
    notes, unit = [], samples.unit
    numbers = sum(entry.numbers_after for entry in prepared.plan.entries if entry.rank is not None)
    if any(REFINEMENTS.get(name).trains for name in recipe.refine) and numbers > MANY * units:
        notes.append(
            f"{numbers:,} numbers are trained on {units:,} calibration {unit}, {numbers / units:,.0f} each; "
            f"a training may learn so few by heart: give more with `{'tokens' if unit == 'tokens' else 'samples'}`"
        )
    if not held_out:
        first = samples.each.removesuffix("s")
        notes.append(
            f"the calibration {kind_of(unit)} left nothing to stop the refinement on, so its first {first} was taken"
        )
    for note in notes if not quiet else []:
        say(note)
    return notes
