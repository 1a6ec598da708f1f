"""The gradient of a job's loss by every whole weight, and the moments of both sides of it, by two halves of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from twofold.calibrate.statistics import rows_of
from twofold.errors import TwofoldError
from twofold.host.folders import check_space
from twofold.host.parts import take_part, write_part
from twofold.host.progress import progress
from twofold.model.frozen import frozen
from twofold.model.kinds import Sink, Taker, watch
from twofold.refine.steps.job import Job
from twofold.refine.steps.likeness import Likeness

# What one run over half of the windows adds up; layers with one input have one moment of it, under the name of the first:
# gradient/NAME Σ g xᵀ (m, n), output/NAME Σ g gᵀ (m, m), input/LEADER Σ x xᵀ (n, n), rows/LEADER how many inputs it was given.
Sums: TypeAlias = dict[str, Tensor]
KINDS = ("gradient", "output", "input", "rows")


def sum_half(job: Job, loss: Likeness, names: list[str], number: int, half: int, mark: str) -> tuple[Sums, float]:
    """Return what every other step over the windows adds up, and the sum of their losses; take up those of an earlier run.

    Raises:
        TwofoldError: naming the first moment that is not finite.
    """
    path = half_path(job, number, half)
    part = take_part(path, mark)
    if part is not None:
        return {name: tensor.to(job.model.device) for name, tensor in part[0].items()}, float(part[1]["loss"])
    sums: Sums = {}
    total = 0.0
    steps = windows_of_half(job, loss, half)
    windows = sum(len(step) for step in steps)
    leaders = {entry.name: entry.group for entry in job.plan.entries}
    sinks = _sinks({name: leaders[name] for name in names}, sums)
    hooks = [hook for name, sink in sinks.items() for hook in watch(job.model.get_submodule(name), sink)]
    with (
        frozen(job.model, hooks),
        progress(f"Gradient, half {half + 1} of 2", windows, unit=job.samples.each, quiet=job.quiet) as tick,
    ):
        for step in steps:
            mean = loss(step.tolist())
            (mean * job.samples.take(step.tolist()).predictions).backward()  # type: ignore[no-untyped-call]
            total += float(mean.detach()) * loss.weigh(step.tolist())
            tick(len(step))
    for kind, _, name in sorted((key.partition("/") for key in sums), key=lambda key: KINDS.index(key[0])):
        if not torch.isfinite(sums[f"{kind}/{name}"]).all():
            raise TwofoldError(
                f"the {kind} moment of {name} in the factored model is NaN or infinite; "
                "keep more of it, or leave that refinement out"
            )
    if path is not None:
        path.unlink(missing_ok=True)  # of something else
        check_space(path.parent, sum(tensor.nbytes for tensor in sums.values()))
        write_part(path, sums, mark, {"loss": repr(total)})
    return sums, total


def windows_of_half(job: Job, loss: Likeness, half: int) -> tuple[Tensor, ...]:
    """Return every other step over the windows; one window alone is both halves."""
    steps = torch.split(torch.arange(len(job.samples)), loss.together if len(job.samples) > loss.together else 1)
    return steps[half::2] or steps


def half_path(job: Job, number: int, half: int) -> Path | None:
    """Return where the sums of one half of a round are kept; None if they are not."""
    return job.path(f"gradient-{number}-{half}.safetensors")


def _sinks(leaders: dict[str, str], sums: Sums) -> dict[str, Sink]:
    """Return what adds to the sums what each layer is given and what comes back to it in a backward pass.

    Args:
        leaders: layer → the first layer with the same input.
    """
    taken: dict[str, str] = {}  # leader → the first layer of that input that is called

    def add(key: str, left: Tensor, right: Tensor) -> None:
        if key not in sums:
            sums[key] = left.new_zeros(left.shape[1], right.shape[1])
        sums[key].addmm_(left.T, right)

    def sink(name: str, leader: str) -> Sink:
        def called(given: Tensor, product: Callable[[], Tensor]) -> Taker | None:
            if not torch.is_grad_enabled():
                return None
            x = _rows(given)
            if taken.setdefault(leader, name) == name:
                add(f"input/{leader}", x, x)
                rows = f"rows/{leader}"
                sums[rows] = sums.get(rows, torch.zeros((), dtype=torch.int64)) + len(x)

            def came_back(gradient: Tensor) -> None:
                g = _rows(gradient)
                add(f"gradient/{name}", g, x)
                add(f"output/{name}", g, g)

            return came_back

        return Sink(called, starts=True)

    return {name: sink(name, leader) for name, leader in leaders.items()}


def _rows(values: Tensor) -> Tensor:  # (rows, width)
    rows = rows_of(values)
    return rows if rows.dtype == torch.float64 else rows.float()
