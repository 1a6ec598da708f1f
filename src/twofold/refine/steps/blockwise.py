"""Train the blocks one after another on the dense model's hidden states."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.host.files import make_folder
from twofold.host.parts import Parts, read_names, write_part
from twofold.host.progress import progress
from twofold.linalg.metric import damp
from twofold.refine import Refined
from twofold.refine.steps.job import Job
from twofold.refine.steps.streams import Streams
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
    recipe, count = job.recipe, len(job.samples)
    samples = job.samples + job.tested
    if job.folder is not None:
        make_folder(job.folder)
    streams = Streams(job.loaded, job.replaced, samples, job.task, job.folder if recipe.activations == "disk" else None)
    start = time.monotonic()
    before = job.divergence()
    judging = time.monotonic() - start
    start = time.monotonic()
    for stream in ("dense", "factored"):
        with torch.no_grad():
            streams.output(stream, 0)
    moving = (time.monotonic() - start) * len(samples)  # seconds to go on to the next block
    done: list[Trained] = []
    trained_parameters = 0
    with progress("Block after block", len(streams.chain), unit="blocks", quiet=job.quiet) as tick:
        for b, name in enumerate(streams.chain.blocks):
            block = job.model.get_submodule(name)
            parameters = trainable(block)
            trained_parameters += sum(p.numel() for p in parameters.values())
            seconds = None
            if job.seconds is not None:
                left = job.seconds - (time.monotonic() - began) - judging - moving * (len(streams.chain) - b - 1)
                seconds = max(left, 0.1) / (len(streams.chain) - b)
            done.append(_block(job, streams, parameters, count, seconds))
            if b + 1 < len(streams.chain):
                start = time.monotonic()
                streams.advance()
                moving = time.monotonic() - start
            tick()
    streams.close()
    return Refined(
        method="blockwise",
        steps=sum(one.steps for one in done),
        planned=sum(one.planned for one in done),
        tokens=sum(one.windows for one in done) * samples.units(0, 1),
        parameters=trained_parameters,
        seconds=time.monotonic() - began,
        unit="nats",
        loss_before=before,
        loss_after=job.divergence(),
        ended=f"{len(done)} blocks, {sum('all steps' in one.ended for one in done)} of them with all their steps",
    )


def _block(
    job: Job, streams: Streams, parameters: dict[str, torch.nn.Parameter], count: int, seconds: float | None
) -> Trained:
    """Train one block, or take what an earlier run has made of it."""
    recipe, b = job.recipe, streams.block
    settings = [recipe.refine_passes, recipe.refine_rate, recipe.refine_batch, recipe.refine_steps, recipe.seed]
    mark = hashlib.sha256(f"{job.mark} {b} {settings}".encode()).hexdigest()
    path = None if job.folder is None else job.folder / f"block-{b:04d}.safetensors"
    if path is not None and path.is_file():
        try:
            names, about = read_names(path, mark)
        except TwofoldError:
            names = []
        if names:
            parts = Parts(dict.fromkeys(names, path))
            for name, parameter in parameters.items():
                parameter.data.copy_(parts[name])
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

    with training(job.model, parameters):
        found = train(
            parameters,
            loss_of,
            held_out,
            windows=count,
            batch=recipe.refine_batch,
            passes=recipe.refine_passes,
            rate=recipe.refine_rate,
            steps=recipe.refine_steps,
            seconds=seconds,
            seed=recipe.seed,
            path=None if path is None else path.with_name(f"training-{b:04d}.safetensors"),
            mark=mark,
            title=f"Block {b + 1} of {len(streams.chain)}",
            quiet=True,
        )
    round_to(parameters, job.loaded.stored_dtype)
    if path is not None:
        write_part(path, dict(parameters), mark, {"trained": json.dumps(vars(found))})
        path.with_name(f"training-{b:04d}.safetensors").unlink(missing_ok=True)
    return found


def _metric(job: Job, streams: Streams) -> Tensor | None:  # (width, width), the mean of its diagonal is 1
    """The second moment of the gradients at the output of the block.

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
