"""Two streams of hidden states side by side, block after block: of the dense model, and of the factored one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from twofold.calibrate.activations import Activations
from twofold.errors import TwofoldError
from twofold.model.blocks import Stretch, body_of, input_before, output_of, run_stretch
from twofold.model.load import LoadedModel
from twofold.model.survey import survey
from twofold.nn.places import dense_again
from twofold.task import Samples, Task, on_device

Stream = Literal["dense", "factored"]
ADDED = 0.05  # relative error, that of bfloat16 among it, below which something counts as added


class Streams:
    """What goes into one block, for every sample: of the dense model from the start, and of the factored one."""

    def __init__(
        self,
        loaded: LoadedModel,
        replaced: Mapping[str, nn.Module],
        samples: Samples,
        task: Task,
        folder: Path | None,
    ) -> None:
        """
        Args:
            folder: where the states are kept; in memory if it is None.

        Raises:
            TwofoldError: if the model is no chain of blocks.
        """
        self.model: Any = loaded.model
        self.samples, self.task = samples, task
        chain = survey(loaded, [], task.example(self.model)).chain
        if chain is None:
            raise TwofoldError(
                f"{type(self.model).__name__} is not one block after another, so it can't be refined block by block; "
                "leave that refinement out"
            )
        self.chain = chain
        self.replaced = [
            {name: module for name, module in replaced.items() if chain.block_of(name) == i} for i in range(len(chain))
        ]
        self.outside = {name: module for name, module in replaced.items() if chain.block_of(name) is None}
        self.block = 0
        self.folder = folder
        self._states: dict[Stream, Activations] = {}

    def _run(self, stream: Stream, i: int) -> Tensor:
        """Run one sample through the block; gives what comes out."""
        model, name = self.model, self.chain.blocks[self.block]
        body, batch = body_of(model), on_device(self.samples.batch(i, i + 1), model.device)
        hidden = None if self.block == 0 else self._states[stream].read(i, i + 1).to(model.device)
        stretch = Stretch(self.chain, self.block, self.block + 1)
        with output_of(model.get_submodule(name)) as kept:
            run_stretch(lambda: self.task.call(body, batch), model, stretch, hidden)
        return kept[0]

    def output(self, stream: Stream, i: int) -> Tensor:  # (1, length, width)
        """What the block makes of one sample."""
        if stream == "dense":
            with torch.no_grad(), dense_again(self.model, {**self.outside, **self.replaced[self.block]}):
                return self._run(stream, i)
        return self._run(stream, i)

    @torch.no_grad()
    def input_of(self, name: str, stream: Stream, i: int) -> Tensor | None:  # (tokens, in)
        """What a layer of the block is given for one sample; None if it is not called."""
        replaced = {**self.outside, **self.replaced[self.block]} if stream == "dense" else {}
        with dense_again(self.model, replaced):
            given = input_before(self.model.get_submodule(name), lambda: self._run(stream, i))
        return None if given is None else given.reshape(-1, given.shape[-1])

    @torch.no_grad()
    def adds(self, name: str) -> bool:
        """Whether the dense block adds what a layer gives to what it gives itself, so that both have the same gradient."""
        before = self.output("dense", 0)
        shift = before.std() * torch.randn(before.shape[-1], generator=torch.Generator().manual_seed(0)).to(before)

        def shifted(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return out + shift

        with dense_again(self.model, {**self.outside, **self.replaced[self.block]}):
            handle = self.model.get_submodule(name).register_forward_hook(shifted)
            try:
                after = self._run("dense", 0)
            finally:
                handle.remove()
        error = (after - before - shift).norm() / (after - before).norm().clamp_min(torch.finfo(before.dtype).tiny)
        return bool(error < ADDED)

    @torch.no_grad()
    def advance(self) -> None:
        """Go on to the next block."""
        states: dict[Stream, Activations] = {}
        for stream in ("dense", "factored"):
            path = None if self.folder is None else self.folder / f"{stream}-{self.block + 1}.state"
            states[stream] = Activations(len(self.samples), path)  # type: ignore[index]
            for i in range(len(self.samples)):
                states[stream].write(i, self.output(stream, i))  # type: ignore[index, arg-type]
        self.close()
        self._states = states
        self.block += 1

    def close(self) -> None:
        """Give the memory or the disk back."""
        for state in self._states.values():
            state.remove()
