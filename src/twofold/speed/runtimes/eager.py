"""PyTorch as it is: transformers' forward with its growing cache, one call a token."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from twofold.evaluation.size import disk_bytes, memory_bytes
from twofold.host.faults import models_errors
from twofold.host.quiet import first_line
from twofold.inference.form import Optimized, optimize
from twofold.model.load import LoadedModel, load_model, window_limit
from twofold.model.work import TokenWork, work_of
from twofold.nn.compact import CompactLinear
from twofold.speed.runtimes import Runtime, Settings, State, greedy, runtime
from twofold.task.causal_lm import need_writer


@dataclass
class TorchState:
    """Sequences and their cache."""

    token: Tensor  # (batch, 1)
    cache: Any


class TorchSession:
    """A transformers model.

    Raises:
        TwofoldError: if it does not write text token by token.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        model = loaded.model
        need_writer(model, loaded.name, "so it can't be timed")
        self.name, self.model = loaded.name, model
        self.positions: int | None = window_limit(model)
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.work: TokenWork | None = work_of(model)
        self.notes: list[str] = []
        if settings.optimize and any(isinstance(module, CompactLinear) for module in model.modules()):
            optimize(model, quiet=settings.quiet)
            done: Optimized = model.twofold_inference
            self.notes = [f"{loaded.name}: {done.words}", *done.notes]
        self.weight_bytes = memory_bytes(model)
        accepted = inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @torch.inference_mode()
    def begin(self, ids: Tensor, room: int) -> TorchState:
        cache = self._cache(len(ids), ids.shape[1] + room)
        with models_errors(lambda error: f"{self.name} can't be timed: {first_line(error)}"):
            output = self._read(ids, cache)
        return TorchState(greedy(output.logits), cache)

    @torch.inference_mode()
    def step(self, state: State) -> None:
        assert isinstance(state, TorchState)
        state.token = greedy(self._write(state.token, state.cache).logits)

    def _cache(self, batch: int, length: int) -> Any:
        return DynamicCache(config=self.model.config)

    def _read(self, ids: Tensor, cache: Any) -> Any:
        return self.model(input_ids=ids.to(self.model.device), past_key_values=cache, use_cache=True, **self.last_only)

    def _write(self, token: Tensor, cache: Any) -> Any:
        return self.model(input_ids=token, past_key_values=cache, use_cache=True)


@runtime
class Eager(Runtime):
    """transformers without more."""

    name: ClassVar[str] = "eager"

    def why_not(self, model: str, settings: Settings) -> str | None:
        folder = Path(model).expanduser()
        graphs = ("*.onnx", "*.xml")
        if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(any(folder.rglob(g)) for g in graphs):
            return "an exported folder without safetensors"
        return None

    def load(self, model: str, settings: Settings) -> LoadedModel:
        return load_model(
            model, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
        )

    def session(self, loaded: LoadedModel, settings: Settings) -> TorchSession:
        return TorchSession(loaded, settings)

    def disk_bytes(self, loaded: LoadedModel) -> int | None:
        return disk_bytes(loaded.source)
