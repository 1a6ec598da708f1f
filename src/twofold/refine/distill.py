"""End to end: the factors learn to predict what the dense model predicts.

The loss is KL(dense ‖ factored) over the next token, at every position of the calibration windows (Hinton et al. 2015). The
dense model is run once; its most likely tokens are kept. A share of the loss can be the cross-entropy of the text itself: the
model then learns the text too, which is a gain on texts of its kind and no longer only likeness to the dense model.
"""

from __future__ import annotations

import time

from twofold.refine.base import Refined, Task, refinement
from twofold.refine.likeness import Likeness
from twofold.refine.training import round_to, train, trainable, training


@refinement("distill")
def distill(task: Task) -> Refined:
    """Train the factors on the divergence from the dense model, and on the labels as far as the recipe says.

    The two together are the loss that is judged, too.

    Raises:
        TwofoldError: if the model gives no token logits.
    """
    began = time.monotonic()
    model, recipe = task.model, task.recipe
    parameters = trainable(model)
    loss = Likeness(task)
    with training(model, parameters):
        start = time.monotonic()
        before = loss.held_out()
        judging = time.monotonic() - start  # which the end takes once more
        trained = train(
            parameters,
            loss,
            loss.held_out,
            windows=len(task.windows),
            batch=recipe.refine_batch,
            together=loss.together,
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
        tokens=trained.windows * task.windows.shape[1],
        parameters=sum(p.numel() for p in parameters.values()),
        seconds=time.monotonic() - began,
        unit="nats",
        loss_before=before,
        loss_after=loss.held_out(),
        ended=trained.ended,
    )
