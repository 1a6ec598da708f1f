"""Train the blocks one after another on the dense model's hidden states."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from twofold.host.parts import take_part, write_part
from twofold.host.progress import progress
from twofold.linalg.metric import damp
from twofold.refine import Refined
from twofold.refine.steps.job import Job
from twofold.refine.steps.streams import STREAMS, Streams
from twofold.refine.steps.training import Trained, round_to, train, trainable, training

RIDGE = 0.1  # damping of the metric of the error


def blockwise(job: Job) -> Refined:
    """Train the blocks one after another on the dense model's hidden states.

    The loss of a position is the squared error of the hidden state in the metric of the gradients (where the objective has
    them, else in the plain one), over the squared norm of the aim: without that the few positions with huge states would
    be all that counts.

    Raises:
        TwofoldError: if the model is no chain of blocks.
    """
    began = time.monotonic()
    count, samples = len(job.samples), job.samples + job.tested
    folder = job.folder if job.recipe.activations == "disk" else None
    streams = Streams(job.loaded, job.replaced, samples, job.task, folder)
    start = time.monotonic()
    before = job.divergence()
    judging = time.monotonic() - start
    start = time.monotonic()
    with torch.no_grad():
        for stream in STREAMS:
            streams.output(stream, 0)
    moving = (time.monotonic() - start) * len(samples)  # seconds to go on to the next block
    trained: list[Trained] = []
    numbers = 0
    with progress("Block after block", len(streams.chain), unit="blocks", quiet=job.quiet) as tick:
        for b, name in enumerate(streams.chain.blocks):
            block = job.model.get_submodule(name)
            parameters = trainable(block)
            numbers += sum(p.numel() for p in parameters.values())
            seconds = None
            if job.seconds is not None:
                left = job.seconds - (time.monotonic() - began) - judging - moving * (len(streams.chain) - b - 1)
                seconds = max(left, 0.1) / (len(streams.chain) - b)
            trained.append(_block(job, streams, parameters, count, seconds))
            if b + 1 < len(streams.chain):
                start = time.monotonic()
                streams.advance()
                moving = time.monotonic() - start
            tick()
    streams.close()
    return Refined(
        method="blockwise",
        steps=sum(block.steps for block in trained),
        planned=sum(block.planned for block in trained),
        tokens=sum(block.windows for block in trained) * samples.units(0, 1),
        parameters=numbers,
        seconds=time.monotonic() - began,
        loss_before=before,
        loss_after=job.divergence(),
        ended=f"{len(trained)} blocks, {sum('all steps' in block.ended for block in trained)} of them with all their steps",
    )


def _block(
    job: Job, streams: Streams, parameters: dict[str, torch.nn.Parameter], count: int, seconds: float | None
) -> Trained:
    """Train one block, or take what an earlier run has made of it."""
    recipe, b = job.recipe, streams.block
    settings = [recipe.refine_passes, recipe.refine_rate, recipe.refine_batch, recipe.refine_steps, recipe.seed]
    mark = hashlib.sha256(f"{job.mark} {b} {settings}".encode()).hexdigest()
    path = job.path(f"block-{b:04d}.safetensors")
    part = take_part(path, mark)
    if part is not None:
        tensors, about = part
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])
        return Trained(**json.loads(about["trained"]))
    if not parameters:
        return Trained(0, 0, 0, 0.0, 0.0, 0.0, "all steps were done: it has no factors")
    metric = _metric(job, streams)

    def loss_of(indices: Sequence[int]) -> Tensor:
        return torch.stack([loss_at(i) for i in indices]).mean()

    def loss_at(i: int) -> Tensor:
        aim = streams.output("dense", i)[0].float()
        error = streams.output("factored", i)[0].float() - aim
        weighted = error if metric is None else error @ metric
        return ((weighted * error).sum(-1) / aim.square().sum(-1).clamp_min(1e-12)).mean()

    @torch.no_grad()
    def held_out() -> float:
        return sum(float(loss_at(i)) for i in range(count, len(streams.samples))) / (len(streams.samples) - count)

    unfinished = job.path(f"training-{b:04d}.safetensors")
    with training(job.model, parameters):
        trained = train(
            parameters,
            loss_of,
            held_out,
            recipe,
            windows=count,
            seconds=seconds,
            path=unfinished,
            mark=mark,
            title=f"Block {b + 1} of {len(streams.chain)}",
            quiet=True,
        )
    round_to(parameters, job.loaded.stored_dtype)
    if path is not None and unfinished is not None:
        write_part(path, dict(parameters), mark, {"trained": json.dumps(vars(trained))})
        unfinished.unlink(missing_ok=True)
    return trained


def _metric(job: Job, streams: Streams) -> Tensor | None:  # (width, width), the mean of its diagonal is 1
    """Return the second moment of the gradients at the output of the block.

    It is that at the output of its last layer, dense or factored, if the block adds this to what it gives; None (the plain
    metric) if a norm comes between, or no gradients were collected.
    """
    if job.moments is None or "gradient" not in job.objective.needs:
        return None
    width = streams.output("dense", 0).shape[-1]
    for entry in reversed(job.plan.entries):
        if streams.chain.block_of(entry.name) == streams.block and entry.out_features == width:
            gradient = job.moments.layer(entry.name).gradient
            if gradient is None or not streams.adds(entry.name):
                return None
            damped = damp(gradient.float(), RIDGE)
            return (damped / damped.diagonal().mean()).to(job.model.device)
    return None
