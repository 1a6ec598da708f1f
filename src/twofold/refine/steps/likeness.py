"""How far the factored model is from the dense one, as a loss with a graph: KL(dense ‖ factored) over the next token.

The dense model is run once; its most likely tokens are kept. A share of the loss can be the cross-entropy of the text itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from twofold.model.head import before_head, find_head
from twofold.refine.steps.job import Job
from twofold.refine.steps.teacher import Teacher, at_once, divergence


class Likeness:
    """The loss of a task's windows and of those that decide, which stand behind them."""

    def __init__(self, job: Job) -> None:
        """Ask the dense model.

        Raises:
            TwofoldError: if the model gives no token logits.
        """
        self.job, self.count = job, len(job.windows)
        self.windows = torch.cat([job.windows, job.tested])  # (count, window)
        self.together = at_once(self.windows)
        self.teacher = Teacher(job.folder, job.mark)
        self.teacher.ask(job.dense_logits, self.windows, "windows", quiet=job.quiet)

    @cached_property
    @torch.no_grad()
    def head(self) -> nn.Linear | None:
        """The layer that makes the logits, if nothing comes after it; to be asked for where it gets no gradient."""
        return find_head(self.job.model, self.windows[:1], self.job.logits(self.windows[:1]))

    def __call__(self, indices: Sequence[int]) -> Tensor:  # ()
        """The mean loss of a position of some windows."""
        ids = self.windows[list(indices)]
        states = self.job.logits(ids) if self.head is None else before_head(self.job.model, self.head, ids)
        assert states is not None
        values, tokens = zip(*(self.teacher.answer("windows", i) for i in indices), strict=True)
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1)
        return divergence(
            states.flatten(0, 1), torch.cat(values), torch.cat(tokens),
            labels=labels.flatten(), share=self.job.recipe.refine_labels, head=self.head,
        )  # fmt: skip

    @torch.no_grad()
    def held_out(self) -> float:
        """The mean loss of the windows that decide."""
        parts = torch.split(torch.arange(self.count, len(self.windows)), self.together)
        return sum(float(self(part.tolist())) * len(part) for part in parts) / (len(self.windows) - self.count)
