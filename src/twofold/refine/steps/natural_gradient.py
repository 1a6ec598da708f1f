"""Take steps against the gradient of the divergence, in closed form, that leave every rank as it is."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from twofold.host.files import make_folder
from twofold.host.progress import progress, say
from twofold.linalg.metric import working_dtype
from twofold.linalg.natural_step import Basis, Step, natural_step, stepped
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import replace_module
from twofold.planning.plan import PlanEntry
from twofold.refine import Refined
from twofold.refine.steps.gradient import Sums, half_path, sum_half, windows_of_half
from twofold.refine.steps.job import Job
from twofold.refine.steps.kept import Solved, keep_layers, take_layers
from twofold.refine.steps.likeness import Likeness
from twofold.refine.steps.training import training

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
    if job.folder is not None:
        make_folder(job.folder)
    layers = {n: m for n in job.replaced if isinstance(m := job.model.get_submodule(n), FactoredLinear)}
    others = len(job.replaced) - len(layers)
    if others:
        note = f"natural-gradient: {others} layers are no two plain factors, and stay as they are"
        job.plan.notes.append(note)
        if not job.quiet:
            say(note)
    loss = Likeness(job)
    done = 0
    before = after = math.nan
    ended = "closed form"
    spent = time.monotonic() - began
    moved: set[str] = set()
    for number in range(rounds):
        mark = hashlib.sha256(f"{job.mark} {job.recipe.refine_labels} round {number}".encode()).hexdigest()
        path = None if job.folder is None else job.folder / f"round-{number}.safetensors"
        known = take_layers(path, mark, job)
        start = time.monotonic()
        if known is None:
            known = _round(job, loss, list(layers), number, mark)
            known.figures["seconds"] = time.monotonic() - start
            if path is not None:
                keep_layers(path, mark, known, job)
                for half in (0, 1):
                    half_path(job, number, half).unlink(missing_ok=True)
        places = {entry.name: i for i, entry in enumerate(job.plan.entries)}
        for entry in known.entries:
            job.plan.entries[places[entry.name]] = entry
        job.plan.notes.extend(known.notes)
        before = known.figures["before"] if number == 0 else before
        after = known.figures["after"]
        if not known.figures["step"]:
            agreed = known.figures["agreed"] > 0
            ended = (
                f"no step of round {number + 1} helps on held-out text"
                if agreed
                else f"the two halves of the tokens agree on no step of round {number + 1}"
            )
            break
        done += 1
        moved |= {entry.name for entry in known.entries}
        spent += known.figures["seconds"]
        if job.seconds is not None and number + 1 < rounds and spent + known.figures["seconds"] > job.seconds:
            ended = f"another round would take longer than there is time, so it ended after round {number + 1}"
            break
    return Refined(
        method="natural-gradient",
        steps=done,
        planned=rounds,
        tokens=done * job.samples.predictions,
        parameters=sum(p.numel() for name in moved for p in job.model.get_submodule(name).parameters()),
        seconds=time.monotonic() - began,
        unit="nats",
        loss_before=before,
        loss_after=after,
        ended=ended,
    )


def _round(job: Job, loss: Likeness, names: list[str], number: int, mark: str) -> Solved:
    """One gradient and one step."""
    with training(job.model, {}):
        before = loss.held_out()
        halves = [sum_half(job, loss, names, number, half, mark) for half in (0, 1)]
        parts = [torch.cat(windows_of_half(job, loss, half)) for half in (0, 1)]
        mean = sum(total for _, total in halves) / sum(len(part) for part in parts)
        predictions = [job.samples.take(part.tolist()).predictions for part in parts]
        steps = _steps(job, names, [sums for sums, _ in halves], predictions)
        agreed = sum(step.agreed for step in steps.values())
        entries = {e.name: e for e in job.plan.entries}
        made: dict[str, PlanEntry] = {}
        held: set[str] = set()
        old: dict[str, FactoredLinear] = {name: job.model.get_submodule(name) for name in steps}

        def put(size: float) -> None:
            held.clear()
            made.clear()
            for name, step in steps.items():
                layer = _layer(step, size, old[name], job.loaded.stored_dtype)
                if layer is None:
                    held.add(name)
                    layer = old[name]
                else:
                    made[name] = entries[name].model_copy(update={"form": layer.form})
                replace_module(job.model, name, layer)

        def trial(size: float) -> float:
            put(size)
            return loss.held_out()

        size, after = 0.0, before
        if agreed > 0:
            with torch.no_grad(), progress("Searching the step", TRIALS, unit="trials", quiet=job.quiet) as tick:
                size, after = search(trial, before, FIRST * mean / agreed, tick)
                if size:
                    put(size)  # the search has gone on from it
        if not size:
            for name, module in old.items():
                replace_module(job.model, name, module)
            made = {}
    notes = []
    if len(windows_of_half(job, loss, 0)) == len(job.samples) == 1:
        notes.append(
            "natural-gradient: one window alone has no halves to compare, so nothing of the gradient is filtered out"
        )
    without = sorted(set(names) - steps.keys())
    if without:
        notes.append(
            f"natural-gradient: {len(without)} layers get no gradient from the calibration text, and stay as they are, "
            f"first {without[0]}"
        )
    if size and held:
        notes.append(
            f"natural-gradient: {len(held)} layers had no bounded gauge form after the step, and stay as they were, "
            f"first {min(held)}"
        )
    return Solved(
        entries=list(made.values()),
        notes=notes,
        figures={"before": before, "after": after, "step": size, "agreed": agreed},
    )


def search(
    trial: Callable[[float], float], before: float, first: float, tick: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """A step that lowers a loss more than its neighbours do, and that loss; 0 and the loss before, if none lowers it.

    It grows as long as that helps, and if it does not, it shrinks as long as that does; a first step that does harm is halved.
    """

    def tried(size: float) -> float:
        loss = trial(size)
        tick()
        return loss

    best, low = 0.0, before
    for halved in range(HALVINGS + 1):
        now = tried(first / 2**halved)
        if now < low:
            best, low = first / 2**halved, now
            break
    if not best:
        return best, low
    began = best
    for factor in (GROWTH, 1 / GROWTH):
        while (now := tried(best * factor)) < low:
            best, low = best * factor, now
        if best != began:
            break
    return best, low


def _steps(job: Job, names: list[str], halves: list[Sums], tokens: list[int]) -> dict[str, Step]:
    """Where each layer goes; sums, of so many tokens each, are given up as they are used."""
    both = sum(tokens)
    leaders = {entry.name: entry.group for entry in job.plan.entries}
    steps: dict[str, Step] = {}
    groups: dict[str, list[str]] = {}
    for name in names:
        if all(name in half.gradients for half in halves):
            groups.setdefault(leaders[name], []).append(name)
    with torch.no_grad(), progress("Finding the step", len(names), unit="weights", quiet=job.quiet) as tick:
        for leader, members in groups.items():
            wide = working_dtype(job.model.get_submodule(members[0]).weight.device)
            seen = float(_total(halves, "rows", leader))  # so that the product of both moments counts each call once
            inputs = Basis.of(_total(halves, "inputs", leader).to(wide) / seen, DAMPING)
            right: Tensor | None = None
            for name in members:
                layer = job.model.get_submodule(name)
                assert isinstance(layer, FactoredLinear)
                moment = _total(halves, "outputs", name).to(wide) / both
                first, second = (
                    half.gradients.pop(name).to(wide) / count for half, count in zip(halves, tokens, strict=True)
                )
                found = natural_step(
                    layer.to_dense(wide), (first, second), Basis.of(moment, DAMPING), inputs, layer.rank
                )
                kept = torch.promote_types(job.model.dtype, torch.float32)
                right = found.right.to(kept) if right is None else right
                steps[name] = Step(
                    found.weight.to(kept), found.direction.to(kept), found.left.to(kept), right, found.agreed
                )
                tick()
    return steps


def _total(halves: list[Sums], kind: Literal["inputs", "outputs", "rows"], name: str) -> Tensor:
    """One moment of both halves, taken out of them."""
    first, second = (getattr(half, kind).pop(name) for half in halves)
    total: Tensor = first + second
    return total


def _layer(step: Step, size: float, old: FactoredLinear, stored: torch.dtype) -> FactoredLinear | None:
    """The layer after a step; None if it would have no bounded gauge form, and so more numbers."""
    left, right = stepped(step, size, old.rank)
    form: Literal["plain", "auto"] = "plain" if old.form == "plain" else "auto"
    made = FactoredLinear.from_factors(left, right, old.bias, form, old.transposed, dtype=stored)
    if made.numbers > old.numbers:
        return None
    like = next(old.parameters())
    return made.to(like.device, like.dtype).requires_grad_(like.requires_grad)
