"""How far the factored model is from the dense one, as a loss with a graph, in nats a prediction.

The dense model is run once, and what its task needs of the outputs is kept. A share of the loss can be that of the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from twofold.model.blocks import input_before
from twofold.model.head import find_head
from twofold.refine.steps.job import Job
from twofold.refine.steps.teacher import Teacher
from twofold.task import LABELS, Batch, on_device
from twofold.task.output import need_labels

TOGETHER = 1024  # rows that go through a layer at once: enough to keep two threads busy


class Likeness:
    """The loss of a job's samples and of those that decide, which stand behind them."""

    def __init__(self, job: Job) -> None:
        """Ask the dense model.

        Raises:
            TwofoldError: if the model gives no outputs of the task, or the recipe asks for labels and there are none.
        """
        self.job, self.count = job, len(job.samples)
        self.samples = job.samples + job.tested
        if share := job.recipe.refine_labels:
            need_labels(job.task.labels(self.samples.batch(0, 1)), f"refine_labels={share:g}")
        self.together = self._together()
        self.teacher = Teacher(job.folder, job.mark, job.task.output)
        self.teacher.ask(job.dense_outputs, self.samples, self.together, quiet=job.quiet)

    @torch.no_grad()
    def _together(self) -> int:
        """Return how many samples go through the model together, by the rows that its layers get of the largest."""
        if self.job.task.streams:  # windows of one size
            return max(TOGETHER // self.samples.units(0, 1), 1)
        rows: list[int] = []

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if given is not None:
                rows.append(given.numel() // (given.shape[-1] if given.is_floating_point() else 1))

        with ExitStack() as hooks:
            for name in self.job.replaced:
                layer = self.job.model.get_submodule(name)
                hooks.enter_context(layer.register_forward_pre_hook(count, with_kwargs=True))
            self._call(self.largest)
        return max(TOGETHER // max(rows, default=TOGETHER), 1)

    @cached_property
    def largest(self) -> Batch:
        """The first sample of those with the most numbers."""
        return max(self.samples, key=lambda batch: sum(tensor.numel() for tensor in batch.values()))

    @cached_property
    @torch.no_grad()
    def head(self) -> nn.Linear | None:
        """The layer that makes the outputs, if nothing comes after it; to be asked for where it gets no gradient.

        It serves only where every place that it is given is a prediction.
        """
        if any(bool((batch[LABELS] < 0).any()) for batch in self.samples if LABELS in batch):
            return None
        return find_head(self.job.model, lambda: self._call(self.largest), self.job.outputs(self.largest))

    def _call(self, batch: Batch) -> Any:
        return self.job.task.call(self.job.model, on_device(batch, self.job.model.device, self.job.model.dtype))

    def weigh(self, indices: Sequence[int]) -> float:
        """Return how many predictions some samples have, in those of the first sample."""
        return self.samples.take(indices).predictions / max(self.samples[:1].predictions, 1)

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
            labels.append(self.job.task.labels(batch))
        answers = [self.teacher.answer(i) for i in indices]
        return self.job.task.output.likeness(
            torch.cat(states) if len(states) > 1 else states[0],
            {key: torch.cat([answer[key] for answer in answers]) for key in answers[0]},
            None if any(own is None for own in labels) else torch.cat(labels),  # type: ignore[arg-type]
            self.job.recipe.refine_labels,
            self.head,
        )

    @torch.no_grad()
    def held_out(self) -> float:
        """Return the mean loss of a prediction of the samples that decide."""
        parts = torch.split(torch.arange(self.count, len(self.samples)), self.together)
        decide = range(self.count, len(self.samples))
        return sum(float(self(part.tolist())) * self.weigh(part.tolist()) for part in parts) / self.weigh(decide)
