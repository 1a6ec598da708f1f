"""Train all factors on the divergence from the dense model."""

from __future__ import annotations

import time

from twofold.refine import Refined, kind_of
from twofold.refine.steps.job import Job
from twofold.refine.steps.likeness import Likeness
from twofold.refine.steps.training import round_to, seen, train, trainable, training


def distill(job: Job) -> Refined:
    """Train the factors on the divergence from the dense model, and on the labels as far as the recipe says.

    The loss that is judged is the sum of both, too.

    Raises:
        TwofoldError: if the model gives no token logits.
    """
    began = time.monotonic()
    model, recipe = job.model, job.recipe
    parameters = trainable(model)
    loss = Likeness(job)
    with training(model, parameters):
        start = time.monotonic()
        before = loss.held_out()
        judging = time.monotonic() - start  # which the end takes once more
        trained = train(
            parameters,
            loss,
            loss.held_out,
            recipe,
            windows=len(job.samples),
            together=loss.together,
            weigh=loss.weigh,
            before=before,
            seconds=None if job.seconds is None else max(job.seconds - (time.monotonic() - began) - judging, 1.0),
            path=job.path("distill.safetensors"),
            mark=f"{job.mark} {recipe.refine_labels}",
            title="Distilling",
            data=kind_of(job.samples.unit),
            quiet=job.quiet,
        )
    round_to(parameters, job.loaded.stored_dtype)
    return Refined(
        method="distill",
        steps=trained.steps,
        planned=trained.planned,
        tokens=sum(job.samples.units(i, i + 1) for i in seen(len(job.samples), recipe.seed, trained.windows)),
        counted=job.samples.unit,
        parameters=sum(p.numel() for p in parameters.values()),
        seconds=time.monotonic() - began,
        loss_before=before,
        loss_after=loss.held_out(),
        ended=trained.ended,
    )
