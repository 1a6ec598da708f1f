"""Language models that write on: windows of tokens, logits of the next token at every position."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.host.faults import models_errors
from twofold.host.quiet import first_line
from twofold.model.blocks import has_two_stacks
from twofold.model.frozen import no_cache
from twofold.model.load import check_ids, need_tokenizer, window_limit
from twofold.settings.base import Settings
from twofold.task import Batch, Data, S, Samples, Task, task
from twofold.task.output.categorical import CATEGORICAL
from twofold.task.text.held_out import evaluation_windows
from twofold.task.text.settings import OF_ROWS, Measuring, Texts
from twofold.task.text.texts import TokenWindows
from twofold.task.text.windows import calibration_windows, fit_window


@task
class CausalLM(Task):
    """The next token at every position of a text; any model that runs on token ids alone is taken for one."""

    name = "causal-lm"
    output = CATEGORICAL
    settings = Texts
    perplexity = streams = fallback = True
    prediction = "token"
    centred = False  # no gain: docs/design.md, section 1

    def fits(self, model: Any) -> bool:
        return not has_two_stacks(model)

    def fitted(self, settings: S, loaded: Any, *, quiet: bool = False) -> S:
        return fit_window(settings, loaded, quiet=quiet)

    def data(
        self, loaded: Any, settings: Settings, hashed: str, given: Iterable[str] | None = None, **how: Any
    ) -> Data:
        return calibration_windows(loaded, settings.part(Texts), hashed, given, **how)

    def measured(self, loaded: Any, settings: Settings) -> Samples | None:
        texts = settings.part(Measuring)
        if texts.eval_text is None or texts.eval_windows == 0:
            return None
        window = min(1024, window_limit(loaded.model) or 1024)
        how = settings.part(Texts).model_dump(include=OF_ROWS)
        samples = evaluation_windows(
            texts.eval_text, need_tokenizer(loaded), window=window, windows=texts.eval_windows, **how
        )
        check_ids(samples.ids, loaded)
        return samples

    def example(self, model: Any, count: int = 8) -> Batch:
        """Return token ids (1, count)."""
        table = None
        with suppress(NotImplementedError, AttributeError):  # a model of several inputs
            table = model.get_input_embeddings()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(int(getattr(table, "num_embeddings", 256)), (1, count), generator=generator)
        return {"input_ids": ids}

    def call(self, module: Any, batch: Batch) -> Any:
        with models_errors(lambda error: f"{type(module).__name__} does not run on text alone ({first_line(error)})"):
            return module(**batch, **no_cache(module))

    def read(self, result: Any, batch: Batch, model: Any) -> Tensor:  # (positions, vocabulary)
        logits = getattr(result, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise TwofoldError(f"{type(model).__name__} gives no token logits")
        return logits.flatten(0, 1)

    @torch.no_grad()
    def predicts(self, model: Any, samples: Samples) -> bool:
        """Say whether the model gives logits over the vocabulary of some windows."""
        assert isinstance(samples, TokenWindows)
        try:
            logits = self.outputs(model, {"input_ids": samples.ids[:1, :8]})
        except TwofoldError:
            return False
        return logits.shape[-1] > int(samples.ids.max())

    def knows(self, model: Any, samples: Samples) -> bool:
        assert isinstance(samples, TokenWindows)
        return int(samples.ids.max()) < getattr(model.config.get_text_config(), "vocab_size", 0)

    def labels(self, batch: Batch) -> Tensor:  # (positions,), the next token; −1 at the end of a window
        ids = batch["input_ids"]
        return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1).flatten()


def writes_text(model: Any) -> bool:
    """Say whether a model writes text, one token after another."""
    return bool(getattr(model, "can_generate", lambda: False)()) and not has_two_stacks(model)


def need_writer(model: Any, name: str, why: str) -> None:
    """Refuse a model that writes no text.

    Args:
        why: what that is asked for, and what to do.

    Raises:
        TwofoldError: if it does not write one token after another.
    """
    if not writes_text(model):
        raise TwofoldError(f"{name} ({type(model).__name__}) does not write text token by token, {why}")
