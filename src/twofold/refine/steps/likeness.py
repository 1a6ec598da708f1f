"""How far the factored model is from the dense one, as a loss with a graph: KL(dense ‖ factored) over the next token.

The dense model is run once; its most likely tokens are kept. A share of the loss can be the cross-entropy of the text itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from twofold.model.blocks import input_before
from twofold.model.head import find_head
from twofold.refine.steps.job import Job
from twofold.refine.steps.teacher import Teacher, at_once, divergence
from twofold.task import Batch, on_device


class Likeness:
    """The loss of a job's samples and of those that decide, which stand behind them."""

    def __init__(self, job: Job) -> None:
        """Ask the dense model.

        Raises:
            TwofoldError: if the model gives no outputs of the task.
        """
        self.job, self.count = job, len(job.samples)
        self.samples = job.samples + job.tested
        self.together = at_once(self.samples)
        self.teacher = Teacher(job.folder, job.mark)
        self.teacher.ask(job.dense_outputs, self.samples, quiet=job.quiet)

    @cached_property
    @torch.no_grad()
    def head(self) -> nn.Linear | None:
        """The layer that makes the outputs, if nothing comes after it; to be asked for where it gets no gradient."""
        batch = self.samples.batch(0, 1)
        return find_head(self.job.model, lambda: self._call(batch), self.job.outputs(batch))

    def _call(self, batch: Batch) -> Any:
        return self.job.task.call(self.job.model, on_device(batch, self.job.model.device))

    def __call__(self, indices: Sequence[int]) -> Tensor:  # ()
        """Return the mean loss of a prediction of some samples."""
        some = self.samples.take(indices)
        states, labels = [], []
        for first, last in some.spans(len(some)):
            batch = some.batch(first, last)
            if self.head is None:
                states.append(self.job.outputs(batch))
            else:
                before_head = input_before(self.head, partial(self._call, batch))
                assert before_head is not None
                states.append(before_head.flatten(0, -2))  # (predictions, width)
            own = self.job.task.labels(batch)
            labels.append(torch.full((len(states[-1]),), -1) if own is None else own)
        values, tokens = zip(*map(self.teacher.answer, indices), strict=True)
        return divergence(
            torch.cat(states) if len(states) > 1 else states[0], torch.cat(values), torch.cat(tokens),
            labels=torch.cat(labels), share=self.job.recipe.refine_labels, head=self.head,
        )  # fmt: skip

    @torch.no_grad()
    def held_out(self) -> float:
        """Return the mean loss of the samples that decide."""
        parts = torch.split(torch.arange(self.count, len(self.samples)), self.together)
        return sum(float(self(part.tolist())) * len(part) for part in parts) / (len(self.samples) - self.count)
