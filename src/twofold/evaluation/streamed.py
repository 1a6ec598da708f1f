"""The logits of a model whose weights are on disk: it is worked through once for all windows, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twofold.calibrate.activations import Activations
from twofold.host.progress import progress
from twofold.model.blocks import Stretch, body_of, output_of, run_stretch, stretches
from twofold.model.streamed import EMBEDDING, HEAD, Streamed
from twofold.task import Samples, Task, on_device


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
                with residence.hold([*([EMBEDDING] * part.is_first), *residence.chain.blocks[part.first : part.last]]):
                    for i in range(len(samples)):
                        self.states.write(i, self._state_after(i, part))
                        tick(samples.units(i, i + 1))

    def _run(self, module: nn.Module, i: int, part: Stretch) -> Any:
        """Run one sample through a stretch of the model, or of its body."""
        batch = on_device(self.samples.batch(i, i + 1), self.residence.device)
        hidden = None if part.is_first else self.states.read(i, i + 1).to(self.residence.device)
        return run_stretch(lambda: self.task.call(module, batch), self.residence.model, part, hidden)

    def _state_after(self, i: int, part: Stretch) -> Tensor:
        """Return the hidden state of one sample after the last block of a stretch."""
        model = self.residence.model
        with output_of(model.get_submodule(self.residence.chain.blocks[-1])) as states:
            out = self._run(body_of(model), i, part)
        return states[0] if part.is_last else out  # type: ignore[no-any-return]

    @torch.no_grad()
    def outputs(self, i: int) -> Tensor:  # (predictions, k)
        """Return the outputs of one of the samples."""
        model, chain = self.residence.model, self.residence.chain
        with self.residence.hold([HEAD]):
            out = self._run(model, i, Stretch(chain, len(chain), len(chain)))
        return self.task.read(out, on_device(self.samples.batch(i, i + 1), self.residence.device), model)
