"""The logits of a model whose weights are on disk: it is worked through once for all windows, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twofold.calibrate.activations import Activations
from twofold.host.progress import progress
from twofold.model.blocks import Stretch, run_stretch, stretches
from twofold.model.frozen import no_cache
from twofold.model.streamed import EMBEDDING, HEAD, Streamed


class LastStates:
    """The hidden states of all windows after the last block; ``logits`` gives what the model makes of them."""

    @torch.no_grad()
    def __init__(self, residence: Streamed, windows: Tensor, *, quiet: bool = False) -> None:  # windows (count, window)
        self.residence, self.windows = residence, windows
        self.states = Activations(len(windows))
        parts = stretches(residence.chain, 1)
        with progress("Running the blocks", windows.numel() * len(parts), unit="tokens", quiet=quiet) as tick:
            for part in parts:
                ending = Stretch(part.chain, part.first, part.last)
                with residence.hold([*([EMBEDDING] * part.is_first), *residence.chain.blocks[part.first : part.last]]):
                    for i in range(len(windows)):
                        out = self._run(windows[i : i + 1], ending, i)
                        self.states.write(i, out)
                        tick(windows.shape[1])

    def _run(self, ids: Tensor, part: Stretch, i: int) -> Tensor:
        """One window through a stretch, to the hidden state after its last block."""
        model: Any = self.residence.model
        ids = ids.to(self.residence.device)
        hidden = None if part.is_first else self.states.read(i, i + 1).to(self.residence.device)
        kept: list[Tensor] = []
        last = model.get_submodule(self.residence.chain.blocks[-1])
        handle = last.register_forward_hook(lambda m, a, out: kept.append(out if isinstance(out, Tensor) else out[0]))
        body = getattr(model, model.base_model_prefix, model)
        try:
            out = run_stretch(lambda: body(input_ids=ids, **no_cache(model)), model, part, hidden)
        finally:
            handle.remove()
        return kept[0] if part.is_last else out  # type: ignore[no-any-return]

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:  # (1, window) to (1, window, vocabulary)
        """The logits of one of the windows."""
        model: Any = self.residence.model
        i = next(i for i, window in enumerate(self.windows) if torch.equal(window, ids[0]))
        hidden = self.states.read(i, i + 1).to(self.residence.device)
        chain = self.residence.chain
        with self.residence.hold([HEAD]):
            after = Stretch(chain, len(chain), len(chain))
            given = ids.to(self.residence.device)
            out = run_stretch(lambda: model(input_ids=given, **no_cache(model)), model, after, hidden)
        return out.logits  # type: ignore[no-any-return]
