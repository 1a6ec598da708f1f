"""Solve each layer anew on the factored model's own inputs."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.factor.apply import factor_layer
from twofold.host.progress import progress
from twofold.linalg.metric import damp, working_dtype
from twofold.linalg.spectrum import spectrum_of
from twofold.model.kinds import dense_weight
from twofold.nn.places import replace_module
from twofold.objectives import LayerMoments, Objective, Problem
from twofold.planning.plan import PlanEntry
from twofold.refine import Refined
from twofold.refine.steps.job import Job
from twofold.refine.steps.solved import Solved, solved
from twofold.refine.steps.streams import Streams


def anchored_problem(
    weight: Tensor,  # W (m, n)
    layer: LayerMoments,  # of the dense model
    inputs: Tensor,  # E[x̂ x̂ᵀ] (n, n)
    cross: Tensor,  # E[x x̂ᵀ] (n, n)
    objective: Objective,
    damping: float,
    mix: float,
) -> tuple[Tensor, Problem]:
    """Return the weight to approximate, and its problem.

    Both moments get the same damping on the diagonal, so that with x̂ = x the weight to approximate is W.
    """
    damped = damp(inputs, damping)
    cross = cross + (damped - inputs)
    turn = torch.linalg.solve(damped, cross, left=False)  # E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹
    turn = mix * turn + (1 - mix) * torch.eye(len(turn), dtype=turn.dtype, device=turn.device)
    backward = layer.input_gradient
    if backward is not None:
        backward = turn.T @ backward.to(turn) @ turn
    layer = replace(layer, input=inputs, output=None, input_trace=float(inputs.trace()), input_gradient=backward)
    aim = weight @ turn
    assert objective.build is not None
    return aim, objective.build(aim, layer, damping)


def anchored(job: Job, mix: float) -> Refined:
    """Solve each layer anew on the factored model's own inputs.

    Args:
        mix: how far to aim at the dense model's outputs; 0 is at the weight itself.

    Raises:
        TwofoldError: if the model is no chain of blocks.
    """
    assert job.moments is not None
    began = time.monotonic()
    folder = job.folder if job.recipe.activations == "disk" else None
    streams = Streams(job.loaded, job.replaced, job.samples, job.task, folder)
    mark = hashlib.sha256(f"{job.mark} {mix}".encode()).hexdigest()
    before = job.divergence()
    with progress("Anchoring", len(streams.chain), unit="blocks", quiet=job.quiet) as tick:
        for b, replaced in enumerate(streams.replaced):
            entries = [entry for entry in job.plan.entries if entry.name in replaced]
            solved(job, f"block-{b:04d}", mark, partial(_solve, job, streams, entries, mix))
            if b + 1 < len(streams.chain):
                streams.advance()
            tick()
    after = job.divergence()
    streams.close()
    return Refined(
        method="anchored",
        steps=0,
        planned=0,
        tokens=job.samples.units(0, len(job.samples)),
        parameters=sum(p.numel() for name in job.replaced for p in job.model.get_submodule(name).parameters()),
        seconds=time.monotonic() - began,
        loss_before=before,
        loss_after=after,
        ended="closed form",
    )


@torch.no_grad()
def _solve(job: Job, streams: Streams, entries: list[PlanEntry], mix: float) -> Solved:
    """Solve the layers of a block, those that share an input together."""
    groups: dict[str, list[PlanEntry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    assert job.moments is not None
    layers = Solved(entries=[], notes=[])
    for group in groups.values():
        moments = _input_moments(job, streams, group[0].name)
        if moments is None:
            layers.entries += group
            continue
        for entry in group:
            module = job.replaced[entry.name]
            weight = dense_weight(module).detach()
            own, damping = job.moments.layer(entry.name), job.recipe.damping
            inputs, cross, mean, dense = moments.centred() if entry.centred else moments
            aim, problem = anchored_problem(weight.to(inputs), own, inputs, cross, job.objective, damping, mix)
            outputs = None
            if entry.centred:
                problem, outputs = replace(problem, mean=mean), weight.to(mean) @ (mix * dense + (1 - mix) * mean)
            if not torch.isfinite(problem.gram).all():
                raise TwofoldError(
                    f"the inputs of {entry.name} in the factored model are NaN or infinite; keep more of it"
                )
            spectrum = spectrum_of(problem.metric, problem.gram, problem.side, torch.finfo(torch.float32).eps)
            wanted = entry.model_copy(update={"form": "plain" if entry.form == "plain" else "gauge"})
            stored = job.loaded.stored_dtype
            layer, solved_entry, note = factor_layer(module, aim, wanted, spectrum, problem, stored, outputs)
            layers.notes += [note] if note is not None else []
            old = replace_module(job.model, entry.name, layer.to(weight.device, weight.dtype))
            layer.requires_grad_(any(p.requires_grad for p in old.parameters()))
            losses = entry.model_dump(include={"predicted_loss", "measured_loss"})
            layers.entries.append(solved_entry.model_copy(update=losses))
    return layers


class _Inputs(NamedTuple):
    """The moments of the inputs x̂ of a layer, and of x, those that the dense model gives it."""

    inputs: Tensor  # E[x̂ x̂ᵀ] (n, n)
    cross: Tensor  # E[x x̂ᵀ] (n, n)
    mean: Tensor  # E[x̂] (n,)
    dense: Tensor  # E[x] (n,)

    def centred(self) -> _Inputs:
        """Return those of inputs without their means, and the means."""
        inputs, cross = (
            outer - torch.outer(x, self.mean) for outer, x in ((self.inputs, self.mean), (self.cross, self.dense))
        )
        return self._replace(inputs=inputs, cross=cross)


def _input_moments(job: Job, streams: Streams, name: str) -> _Inputs | None:
    """Return the moments of the inputs of a layer over all samples; None if both models never call it alike."""
    sums: Tensor | None = None  # (2, n, n)
    means: Tensor | None = None  # (2, n)
    rows = 0
    for i in range(len(job.samples)):
        own, dense = streams.input_of(name, "factored", i), streams.input_of(name, "dense", i)
        if own is None or dense is None or len(own) != len(dense):
            continue
        own, dense = (x if x.dtype == torch.float64 else x.float() for x in (own, dense))
        if sums is None:
            sums, means = own.new_zeros(2, own.shape[1], own.shape[1]), own.new_zeros(2, own.shape[1])
        assert means is not None
        means += torch.stack([own.sum(0), dense.sum(0)])
        sums[0].addmm_(own.T, own)
        sums[1].addmm_(dense.T, own)
        rows += len(own)
    if sums is None or means is None:
        return None
    wide = working_dtype(job.model.device)
    return _Inputs(*(sums.to(wide) / rows), *(means.to(wide) / rows))
