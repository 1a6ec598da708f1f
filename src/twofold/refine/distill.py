"""End to end: the factors learn to predict what the dense model predicts.

The loss is KL(dense ‖ factored) over the next token, at every position of the calibration windows (Hinton et al. 2015). The
dense model is run once; its most likely tokens are kept. A share of the loss can be the cross-entropy of the text itself: the
model then learns the text too, which is a gain on texts of its kind and no longer only likeness to the dense model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from twofold.refine.base import Refined, Task, refinement
from twofold.refine.head import before_head, find_head
from twofold.refine.teacher import Teacher, at_once, divergence
from twofold.refine.training import round_to, train, trainable, training


@refinement("distill")
def distill(task: Task) -> Refined:
    """Train the factors on the divergence from the dense model, and on the labels as far as the recipe says.

    The two together are the loss that is judged, too.

    Raises:
        TwofoldError: if the model gives no token logits.
    """
    began = time.monotonic()
    model, recipe, held = task.model, task.recipe, task.tested
    parameters = trainable(model)
    count = len(task.windows)
    windows = torch.cat([task.windows, held])
    teacher = Teacher(task.folder, task.mark)
    teacher.ask(task.dense_logits, windows, "windows", quiet=task.quiet)

    def loss_of(indices: Sequence[int]) -> Tensor:
        ids = windows[list(indices)]
        states = task.logits(ids) if head is None else before_head(model, head, ids)
        assert states is not None
        values, tokens = zip(*(teacher.answer("windows", i) for i in indices), strict=True)
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1)
        return divergence(
            states.flatten(0, 1), torch.cat(values), torch.cat(tokens),
            labels=labels.flatten(), share=recipe.refine_labels, head=head,
        )  # fmt: skip

    @torch.no_grad()
    def held_out() -> float:
        parts = torch.split(torch.arange(count, len(windows)), together)
        return sum(float(loss_of(part.tolist())) * len(part) for part in parts) / len(held)

    together = at_once(windows)
    with training(model, parameters):
        with torch.no_grad():
            head = find_head(model, windows[:1], task.logits(windows[:1]))
            start = time.monotonic()
            before = held_out()
            judging = time.monotonic() - start  # which the end takes once more
        trained = train(
            parameters,
            loss_of,
            held_out,
            windows=count,
            batch=recipe.refine_batch,
            together=together,
            before=before,
            passes=recipe.refine_passes,
            rate=recipe.refine_rate,
            steps=recipe.refine_steps,
            seconds=None if task.seconds is None else max(task.seconds - (time.monotonic() - began) - judging, 1.0),
            seed=recipe.seed,
            path=None if task.folder is None else task.folder / "distill.safetensors",
            mark=f"{task.mark} {recipe.refine_labels}",
            title="Distilling",
            quiet=task.quiet,
        )
    round_to(parameters, task.loaded.stored_dtype)
    return Refined(
        method="distill",
        steps=trained.steps,
        planned=trained.planned,
        tokens=trained.windows * windows.shape[1],
        parameters=sum(p.numel() for p in parameters.values()),
        seconds=time.monotonic() - began,
        unit="nats",
        loss_before=before,
        loss_after=held_out(),
        ended=trained.ended,
    )
