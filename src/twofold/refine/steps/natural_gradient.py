"""Take steps against the gradient of the divergence, in closed form, that leave every rank as it is."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from twofold.host.progress import progress, say
from twofold.linalg.metric import working_dtype
from twofold.linalg.natural_step import Basis, Step, natural_step, stepped
from twofold.model.frozen import frozen
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import replace_module
from twofold.refine import Refined, kind_of
from twofold.refine.steps.gradient import Sums, half_path, sum_half, windows_of_half
from twofold.refine.steps.job import Job
from twofold.refine.steps.likeness import Likeness
from twofold.refine.steps.solved import Solved, solved

DAMPING = 0.03  # added to the eigenvalues of both moments, relative to their mean
FIRST = 0.2  # share of the loss that the first step of the search would take off if the loss were linear
GROWTH = 1.4  # of the step, as long as it helps
TRIALS = 5  # about so many does the search take
HALVINGS = 4  # of a first step that does harm, before the search is given up


def natural_gradient(job: Job, rounds: int) -> Refined:
    """Take a step for each round, as large as held-out text says.

    Raises:
        TwofoldError: if the model gives no token logits, or a gradient is not finite.
    """
    began = time.monotonic()
    layers = {n: m for n in job.replaced if isinstance(m := job.model.get_submodule(n), FactoredLinear)}
    if others := len(job.replaced) - len(layers):
        note = f"natural-gradient: {others} layers are no two plain factors, and stay as they are"
        job.plan.notes.append(note)
        if not job.quiet:
            say(note)
    loss = Likeness(job)
    steps, before, after, ended = 0, math.nan, math.nan, "closed form"
    spent = time.monotonic() - began
    moved: set[str] = set()
    unit = job.samples.unit
    for number in range(rounds):
        mark = hashlib.sha256(f"{job.mark} {job.recipe.refine_labels} round {number}".encode()).hexdigest()
        solution = solved(job, f"round-{number}", mark, partial(_round, job, loss, list(layers), number, mark))
        for path in (half_path(job, number, half) for half in (0, 1)):
            if path is not None:
                path.unlink(missing_ok=True)
        figures = solution.figures
        before = figures["before"] if number == 0 else before
        after = figures["after"]
        if not figures["step"]:
            none = f"no step of round {number + 1}"
            agreed = figures["agreed"] > 0
            ended = (
                f"{none} helps on held-out {kind_of(unit)}"
                if agreed
                else f"the two halves of the {unit} agree on {none}"
            )
            break
        steps += 1
        moved |= {entry.name for entry in solution.entries}
        spent += figures["seconds"]
        if job.seconds is not None and number + 1 < rounds and spent + figures["seconds"] > job.seconds:
            ended = f"another round would take longer than there is time, so it ended after round {number + 1}"
            break
    return Refined(
        method="natural-gradient",
        steps=steps,
        planned=rounds,
        tokens=steps * job.samples.units(0, len(job.samples)),
        counted=unit,
        parameters=sum(p.numel() for name in moved for p in job.model.get_submodule(name).parameters()),
        seconds=time.monotonic() - began,
        loss_before=before,
        loss_after=after,
        ended=ended,
    )


def _round(job: Job, loss: Likeness, names: list[str], number: int, mark: str) -> Solved:
    """Take one step against one gradient."""
    began = time.monotonic()
    with frozen(job.model):
        before = loss.held_out()
        halves = [sum_half(job, loss, names, number, half, mark) for half in (0, 1)]
        parts = [torch.cat(windows_of_half(job, loss, half)) for half in (0, 1)]
        mean = sum(total for _, total in halves) / sum(loss.weigh(part.tolist()) for part in parts)
        predictions = [job.samples.take(part.tolist()).predictions for part in parts]
        steps = _steps(job, names, [sums for sums, _ in halves], predictions)
        agreed = sum(step.agreed for step in steps.values())
        old: dict[str, FactoredLinear] = {name: job.model.get_submodule(name) for name in steps}

        def put(size: float) -> None:
            for name, step in steps.items():
                replace_module(job.model, name, _layer(step, size, old[name], job.loaded.stored_dtype) or old[name])

        size, after = 0.0, before
        if agreed > 0:
            with torch.no_grad(), progress("Searching the step", TRIALS, unit="trials", quiet=job.quiet) as tick:

                def trial(size: float) -> float:
                    put(size)
                    loss_after = loss.held_out()
                    tick()
                    return loss_after

                size, after = search(trial, before, FIRST * mean / agreed)
                if size:
                    put(size)  # the search has gone on from it
        if not size:
            for name, layer in old.items():
                replace_module(job.model, name, layer)
    moved = {name: layer for name in steps if (layer := job.model.get_submodule(name)) is not old[name]}
    notes = []
    if len(windows_of_half(job, loss, 0)) == len(job.samples) == 1:
        one = job.samples.each.removesuffix("s")
        notes.append(f"one {one} alone has no halves to compare, so nothing of the gradient is filtered out")
    if without := sorted(set(names) - steps.keys()):
        notes.append(
            f"{len(without)} layers get no gradient from the calibration {kind_of(job.samples.unit)}, and stay as they are, "
            f"first {without[0]}"
        )
    if size and (unbounded := sorted(steps.keys() - moved.keys())):
        notes.append(
            f"{len(unbounded)} layers had no bounded gauge form after the step, and stay as they were, first {unbounded[0]}"
        )
    entries = {entry.name: entry for entry in job.plan.entries}
    solved_entries = [entries[name].model_copy(update={"form": layer.form}) for name, layer in moved.items()]
    figures = {"before": before, "after": after, "step": size, "agreed": agreed, "seconds": time.monotonic() - began}
    return Solved(entries=solved_entries, notes=[f"natural-gradient: {note}" for note in notes], figures=figures)


def search(trial: Callable[[float], float], before: float, first: float) -> tuple[float, float]:
    """Find a step that lowers a loss more than its neighbours do; return it and that loss, or 0 and the loss before.

    It grows as long as that helps, and if it does not, it shrinks as long as that does; a first step that does harm is halved.
    """
    for best in (first / 2**halved for halved in range(HALVINGS + 1)):
        low = trial(best)
        if low < before:
            break
    else:
        return 0.0, before
    began = best
    for factor in (GROWTH, 1 / GROWTH):
        while (now := trial(best * factor)) < low:
            best, low = best * factor, now
        if best != began:
            break
    return best, low


def _steps(job: Job, names: list[str], halves: list[Sums], tokens: list[int]) -> dict[str, Step]:
    """Find where each layer goes; sums, of so many tokens each, are given up as they are used."""
    leaders = {entry.name: entry.group for entry in job.plan.entries}
    steps: dict[str, Step] = {}
    groups: dict[str, list[str]] = {}
    for name in names:
        if all(f"gradient/{name}" in half for half in halves):
            groups.setdefault(leaders[name], []).append(name)
    with torch.no_grad(), progress("Finding the step", len(names), unit="weights", quiet=job.quiet) as tick:
        for leader, members in groups.items():
            wide = working_dtype(job.model.get_submodule(members[0]).weight.device)
            seen = float(_total(halves, f"rows/{leader}"))  # so that the product of both moments counts each call once
            inputs = Basis.of(_total(halves, f"input/{leader}").to(wide) / seen, DAMPING)
            right: Tensor | None = None
            for name in members:
                layer = job.model.get_submodule(name)
                assert isinstance(layer, FactoredLinear)
                outputs = Basis.of(_total(halves, f"output/{name}").to(wide) / sum(tokens), DAMPING)
                first, second = (
                    half.pop(f"gradient/{name}").to(wide) / count for half, count in zip(halves, tokens, strict=True)
                )
                step = natural_step(layer.to_dense(wide), (first, second), outputs, inputs, layer.rank)
                dtype = torch.promote_types(job.model.dtype, torch.float32)
                right = step.right.to(dtype) if right is None else right
                weight, direction, left = (part.to(dtype) for part in (step.weight, step.direction, step.left))
                steps[name] = Step(weight, direction, left, right, step.agreed)
                tick()
    return steps


def _total(halves: list[Sums], key: str) -> Tensor:
    """Take one moment out of both halves, and return their sum."""
    first, second = (half.pop(key) for half in halves)
    return first + second


def _layer(step: Step, size: float, old: FactoredLinear, stored: torch.dtype) -> FactoredLinear | None:
    """Return the layer after a step; None if it would have no bounded gauge form, and so more numbers."""
    left, right = stepped(step, size, old.rank)
    form: Literal["plain", "auto"] = "plain" if old.form == "plain" else "auto"
    layer = FactoredLinear.from_factors(left, right, old.bias, form, old.transposed, dtype=stored)
    if layer.numbers > old.numbers:
        return None
    like = next(old.parameters())
    return layer.to(like.device, like.dtype).requires_grad_(like.requires_grad)
