"""The logits of a model whose weights are on disk: it is worked through once for all windows, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twofold.calibrate.activations import Activations
from twofold.host.progress import progress
from twofold.model.blocks import Stretch, body_of, output_of, run_stretch, stretches
from twofold.model.streamed import EMBEDDING, HEAD, Streamed
from twofold.task import Batch, Samples, Task, on_device


class LastStates:
    """The hidden states of all samples after the last block; ``outputs`` gives what the model makes of them."""

    @torch.no_grad()
    def __init__(self, residence: Streamed, samples: Samples, task: Task, *, quiet: bool = False) -> None:
        self.residence, self.samples, self.task = residence, samples, task
        self.states = Activations(len(samples))
        parts = stretches(residence.chain, 1)
        total = samples.units(0, len(samples)) * len(parts)
        with progress("Running the blocks", total, unit=samples.unit, quiet=quiet) as tick:
            for part in parts:
                ending = Stretch(part.chain, part.first, part.last)
                with residence.hold([*([EMBEDDING] * part.is_first), *residence.chain.blocks[part.first : part.last]]):
                    for i in range(len(samples)):
                        self.states.write(i, self._run(i, ending))
                        tick(samples.units(i, i + 1))

    def _batch(self, i: int) -> Batch:
        return on_device(self.samples.batch(i, i + 1), self.residence.device)

    def _run(self, i: int, part: Stretch) -> Tensor:
        """Run one sample through a stretch, to the hidden state after its last block."""
        model: Any = self.residence.model
        hidden = None if part.is_first else self.states.read(i, i + 1).to(self.residence.device)
        last = model.get_submodule(self.residence.chain.blocks[-1])
        body, batch = body_of(model), self._batch(i)
        with output_of(last) as kept:
            out = run_stretch(lambda: self.task.call(body, batch), model, part, hidden)
        return kept[0] if part.is_last else out  # type: ignore[no-any-return]

    @torch.no_grad()
    def outputs(self, i: int) -> Tensor:  # (predictions, k)
        """Return the outputs of one of the samples."""
        model: Any = self.residence.model
        hidden = self.states.read(i, i + 1).to(self.residence.device)
        chain, batch = self.residence.chain, self._batch(i)
        with self.residence.hold([HEAD]):
            after = Stretch(chain, len(chain), len(chain))
            out = run_stretch(lambda: self.task.call(model, batch), model, after, hidden)
        return self.task.read(out, model)
