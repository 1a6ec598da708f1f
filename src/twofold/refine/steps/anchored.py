"""Solve each layer anew on the factored model's own inputs."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.factor.apply import factor_layer
from twofold.host.files import make_folder
from twofold.host.progress import progress
from twofold.linalg.metric import damp, working_dtype
from twofold.linalg.spectrum import decompose
from twofold.model.kinds import dense_weight
from twofold.nn.places import replace_module
from twofold.objectives import LayerMoments, Objective, Problem
from twofold.planning.plan import PlanEntry
from twofold.refine import Refined
from twofold.refine.steps.job import Job
from twofold.refine.steps.kept import Solved, keep_layers, take_layers
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
    """The weight to approximate, and its problem.

    Both moments get the same damping on the diagonal, so that with x̂ = x the weight to approximate is W.
    """
    damped = damp(inputs, damping)
    cross = cross + (damped - inputs)
    turn = torch.linalg.solve(damped, cross, left=False)  # E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹
    turn = mix * turn + (1 - mix) * torch.eye(len(turn), dtype=turn.dtype, device=turn.device)
    backward = layer.input_gradient
    new = replace(
        layer,
        input=inputs,
        output=None,
        input_trace=float(inputs.trace()),
        input_gradient=None if backward is None else turn.T @ backward.to(turn) @ turn,
    )
    aim = weight @ turn
    assert objective.build is not None
    return aim, objective.build(aim, new, damping)


def anchored(job: Job, mix: float) -> Refined:
    """Solve each layer anew on the factored model's own inputs.

    Args:
        mix: how far to aim at the dense model's outputs; 0 is at the weight itself.

    Raises:
        TwofoldError: if the model is no chain of blocks.
    """
    assert job.moments is not None
    began = time.monotonic()
    if job.folder is not None:
        make_folder(job.folder)
    streams = Streams(
        job.loaded, job.replaced, job.samples, job.task, job.folder if job.recipe.activations == "disk" else None
    )
    chain = streams.chain
    mark = hashlib.sha256(f"{job.mark} {mix}".encode()).hexdigest()
    places = {entry.name: i for i, entry in enumerate(job.plan.entries)}
    before = job.divergence()
    with progress("Anchoring", len(chain), unit="blocks", quiet=job.quiet) as tick:
        for b in range(len(chain)):
            entries = [job.plan.entries[places[name]] for name in places if name in streams.replaced[b]]
            path = None if job.folder is None else job.folder / f"block-{b:04d}.safetensors"
            known = take_layers(path, mark, job)
            if known is None:
                known = _solve(job, streams, entries, mix)
                if path is not None:
                    keep_layers(path, mark, known, job)
            for entry in known.entries:
                job.plan.entries[places[entry.name]] = entry
            job.plan.notes.extend(known.notes)
            if b + 1 < len(chain):
                streams.advance()
            tick()
    after = job.divergence()
    streams.close()
    return Refined(
        method="anchored",
        steps=0,
        planned=0,
        tokens=job.samples.predictions,
        parameters=sum(p.numel() for name in job.replaced for p in job.model.get_submodule(name).parameters()),
        seconds=time.monotonic() - began,
        unit="nats",
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
    solved: list[PlanEntry] = []
    notes: list[str] = []
    for group in groups.values():
        name = group[0].name
        dtype = working_dtype(job.model.device)
        inputs = cross = None
        rows = 0
        for i in range(len(job.samples)):
            own, dense = streams.input_of(name, "factored", i), streams.input_of(name, "dense", i)
            if own is None or dense is None or len(own) != len(dense):
                continue
            own, dense = (x if x.dtype == torch.float64 else x.float() for x in (own, dense))
            if inputs is None or cross is None:
                inputs = torch.zeros(own.shape[1], own.shape[1], dtype=own.dtype, device=own.device)
                cross = torch.zeros_like(inputs)
            inputs.addmm_(own.T, own)
            cross.addmm_(dense.T, own)
            rows += len(own)
        if inputs is None or cross is None:
            solved += group
            continue
        inputs, cross = inputs.to(dtype) / rows, cross.to(dtype) / rows
        for entry in group:
            module = job.replaced[entry.name]
            weight = dense_weight(module).detach()
            aim, problem = anchored_problem(
                weight.to(dtype), job.moments.layer(entry.name), inputs, cross, job.objective, job.recipe.damping,
                mix,
            )  # fmt: skip
            if not torch.isfinite(problem.gram).all():
                raise TwofoldError(
                    f"the inputs of {entry.name} in the factored model are NaN or infinite; keep more of it"
                )
            spectrum = decompose(problem.metric, problem.gram, problem.side, torch.finfo(torch.float32).eps)
            wanted = entry.model_copy(update={"form": "plain" if entry.form == "plain" else "gauge"})
            layer, done, note = factor_layer(module, aim, wanted, spectrum, problem, job.loaded.stored_dtype)
            notes += [note] if note is not None else []
            old = replace_module(job.model, entry.name, layer.to(weight.device, weight.dtype))
            layer.requires_grad_(any(p.requires_grad for p in old.parameters()))
            solved.append(
                done.model_copy(update={"predicted_loss": entry.predicted_loss, "measured_loss": entry.measured_loss})
            )
    return Solved(entries=solved, notes=notes)
