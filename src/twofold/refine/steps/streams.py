"""Two streams of hidden states side by side, block after block: of the dense model, and of the factored one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from twofold.calibrate.activations import Activations
from twofold.errors import TwofoldError
from twofold.host.files import make_folder
from twofold.model.blocks import Stretch, body_of, input_before, output_of, run_stretch
from twofold.model.load import LoadedModel
from twofold.model.survey import survey
from twofold.nn.places import dense_again
from twofold.task import Samples, Task, on_device

Stream: TypeAlias = Literal["dense", "factored"]
STREAMS: tuple[Stream, ...] = ("dense", "factored")
ADDED = 0.05  # relative error, that of bfloat16 among it, below which something counts as added


class Streams:
    """What goes into one block, for every sample: of the dense model from the start, and of the factored one."""

    def __init__(
        self, loaded: LoadedModel, replaced: Mapping[str, nn.Module], samples: Samples, task: Task, folder: Path | None
    ) -> None:
        """
        Args:
            folder: where the states are kept; in memory if it is None.

        Raises:
            TwofoldError: if the model is no chain of blocks.
        """
        if folder is not None:
            make_folder(folder)
        self.model: Any = loaded.model
        self.samples, self.task = samples, task
        chain = survey(loaded, [], task.example(self.model)).chain
        if chain is None:
            raise TwofoldError(
                f"{type(self.model).__name__} is not one block after another, so it can't be refined block by block; "
                "leave that refinement out"
            )
        self.chain = chain
        self.outside, *self.replaced = (
            {name: module for name, module in replaced.items() if chain.block_of(name) == block}
            for block in (None, *range(len(chain)))
        )
        self.block, self.folder = 0, folder
        self._states: dict[Stream, Activations] = {}

    def _as(self, stream: Stream) -> AbstractContextManager[None]:
        """Give the model the layers of a stream within the block."""
        dense = {**self.outside, **self.replaced[self.block]} if stream == "dense" else {}
        return dense_again(self.model, dense)

    def _run(self, stream: Stream, i: int) -> Tensor:
        """Run one sample through the block; return what comes out."""
        model, name = self.model, self.chain.blocks[self.block]
        body, batch = body_of(model), on_device(self.samples.batch(i, i + 1), model.device)
        hidden = None if self.block == 0 else self._states[stream].read(i, i + 1).to(model.device)
        stretch = Stretch(self.chain, self.block, self.block + 1)
        with output_of(model.get_submodule(name)) as states:
            run_stretch(lambda: self.task.call(body, batch), model, stretch, hidden)
        return states[0]

    def output(self, stream: Stream, i: int) -> Tensor:  # (1, length, width)
        """Return what the block makes of one sample; that of the dense model has no graph."""
        with torch.set_grad_enabled(stream == "factored" and torch.is_grad_enabled()), self._as(stream):
            return self._run(stream, i)

    @torch.no_grad()
    def input_of(self, name: str, stream: Stream, i: int) -> Tensor | None:  # (tokens, in)
        """Return what a layer of the block is given for one sample; None if it is not called."""
        with self._as(stream):
            given = input_before(self.model.get_submodule(name), lambda: self._run(stream, i))
        return None if given is None else given.reshape(-1, given.shape[-1])

    @torch.no_grad()
    def adds(self, name: str) -> bool:
        """Say whether the dense block adds a layer's output to its own, so that both have the same gradient."""
        before = self.output("dense", 0)
        shift = before.std() * torch.randn(before.shape[-1], generator=torch.Generator().manual_seed(0)).to(before)
        with (
            self._as("dense"),
            self.model.get_submodule(name).register_forward_hook(lambda module, args, out: out + shift),
        ):
            after = self._run("dense", 0)
        error = (after - before - shift).norm() / (after - before).norm().clamp_min(torch.finfo(before.dtype).tiny)
        return bool(error < ADDED)

    @torch.no_grad()
    def advance(self) -> None:
        """Go on to the next block."""
        states: dict[Stream, Activations] = {}
        for stream in STREAMS:
            path = None if self.folder is None else self.folder / f"{stream}-{self.block + 1}.state"
            states[stream] = Activations(len(self.samples), path)
            for i in range(len(self.samples)):
                states[stream].write(i, self.output(stream, i))
        self.close()
        self._states = states
        self.block += 1

    def close(self) -> None:
        """Give the memory or the disk back."""
        for state in self._states.values():
            state.remove()
