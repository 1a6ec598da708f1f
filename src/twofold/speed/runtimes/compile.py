"""torch.compile with a static cache: one compiled graph for the step of each batch size, and one for long prompts.

Short prompts are read by the plain forward, as transformers' own ``generate`` does, since their lengths differ from call to call.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import StaticCache

from twofold.errors import TwofoldError
from twofold.host.quiet import first_line
from twofold.model.load import LoadedModel
from twofold.speed.runtimes import Settings, runtime
from twofold.speed.runtimes.eager import Eager, TorchSession

LONG = 256  # tokens from which on a prompt is read by a compiled graph


class CompiledSession(TorchSession):
    """A transformers model whose forward is compiled."""

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        super().__init__(loaded, settings)
        self._caches: dict[tuple[int, int], Any] = {}
        self._compiled = torch.compile(self.model.forward, dynamic=False)

    def _cache(self, batch: int, length: int) -> Any:
        """Return the one cache of each size, emptied: its tensors stay where the graphs know them."""
        if (batch, length) not in self._caches:
            self._caches[batch, length] = StaticCache(config=self.model.config, max_cache_len=length)
        cache = self._caches[batch, length]
        cache.reset()  # type: ignore[no-untyped-call, unused-ignore]
        return cache

    def _read(self, ids: Tensor, cache: Any) -> Any:
        if ids.shape[1] < LONG:
            return super()._read(ids, cache)
        return self._run(ids.to(self.model.device), cache, **self.last_only)

    def _write(self, token: Tensor, cache: Any) -> Any:
        return self._run(token, cache)

    def _run(self, ids: Tensor, cache: Any, **settings: Any) -> Any:
        try:
            return self._compiled(input_ids=ids, past_key_values=cache, use_cache=True, **settings)  # type: ignore[no-untyped-call]
        except Exception as error:  # no compiler, or a forward that it can't follow
            raise TwofoldError(
                f"torch.compile can't run {self.name} here ({first_line(error)}); it needs a C++ compiler on a processor; "
                "install one, or leave compile out of `runtime`"
            ) from error


@runtime
class Compile(Eager):
    """The same models, compiled."""

    name: ClassVar[str] = "compile"

    def session(self, loaded: LoadedModel, settings: Settings) -> CompiledSession:
        return CompiledSession(loaded, settings)
