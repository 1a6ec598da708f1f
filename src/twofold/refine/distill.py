"""End to end: the factors learn to predict what the dense model predicts.

The loss is KL(dense ‖ factored) over the next token, at every position of the calibration windows (Hinton et al. 2015). The
dense model is run once; its most likely tokens are kept.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from twofold.refine.base import Refined, Task, refinement
from twofold.refine.teacher import Teacher, divergence
from twofold.refine.training import round_to, train, trainable, training


@refinement("distill")
def distill(task: Task) -> Refined:
    """Train the factors on the divergence from the dense model.

    Raises:
        TwofoldError: if the model gives no token logits.
    """
    began = time.monotonic()
    model, recipe = task.model, task.recipe
    parameters = trainable(model)
    held = task.tested
    before = task.divergence()
    judging = time.monotonic() - began  # which the end takes once more
    teacher = Teacher(task.folder, task.mark)
    teacher.ask(task.dense_logits, torch.cat([task.windows, held]), "windows", quiet=task.quiet)

    def loss_of(i: int) -> Tensor:
        ids = task.windows[i : i + 1] if i < len(task.windows) else held[i - len(task.windows)][None]
        return divergence(task.logits(ids)[0], *teacher.answer("windows", i))

    @torch.no_grad()
    def held_out() -> float:
        return sum(float(loss_of(len(task.windows) + i)) for i in range(len(held))) / len(held)

    left = None if task.seconds is None else max(task.seconds - (time.monotonic() - began) - judging, 1.0)
    with training(model, parameters):
        trained = train(
            parameters,
            loss_of,
            held_out,
            windows=len(task.windows),
            batch=recipe.refine_batch,
            passes=recipe.refine_passes,
            rate=recipe.refine_rate,
            steps=recipe.refine_steps,
            seconds=left,
            seed=recipe.seed,
            path=None if task.folder is None else task.folder / "distill.safetensors",
            mark=task.mark,
            title="Distilling",
            quiet=task.quiet,
        )
    round_to(parameters, task.loaded.stored_dtype)
    return Refined(
        method="distill",
        steps=trained.steps,
        planned=trained.planned,
        tokens=trained.windows * task.windows.shape[1],
        parameters=sum(p.numel() for p in parameters.values()),
        seconds=time.monotonic() - began,
        unit="nats",
        loss_before=before,
        loss_after=task.divergence(),
        ended=trained.ended,
    )
