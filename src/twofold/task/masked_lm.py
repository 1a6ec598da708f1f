"""Language models that fill in what is masked: windows of tokens of which 15 % are hidden."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.model.blocks import has_two_stacks
from twofold.model.load import need_tokenizer
from twofold.settings.base import Settings
from twofold.task import LABELS, TASKS, Batch, Data, S, Samples, Task, task
from twofold.task.data.example import example_of
from twofold.task.data.logits import at_labels, logits_of
from twofold.task.output.categorical import CATEGORICAL
from twofold.task.text.masked import MaskedWindows
from twofold.task.text.settings import Texts
from twofold.task.text.windows import fit_window

SHARE = 0.15  # of the tokens that are hidden (Devlin et al. 2019), each by the mask


@task
class MaskedLM(Task):
    """The tokens that are hidden in a window of text."""

    name, pipeline = "masked-lm", "fill-mask"
    output = CATEGORICAL
    settings = Texts
    perplexity = streams = True
    mappings = ("MASKED_LM",)

    def fits(self, model: Any) -> bool:
        return super().fits(model) and not has_two_stacks(model)

    def fitted(self, settings: S, loaded: Any, *, quiet: bool = False) -> S:
        return fit_window(settings, loaded, quiet=quiet)

    def data(
        self, loaded: Any, settings: Settings, hashed: str, given: Iterable[str] | None = None, **how: Any
    ) -> Data:
        texts = settings.part(Texts)
        if given is None and texts.calibration == ["self"]:
            raise TwofoldError("masked-lm needs texts to calibrate on: name some with `calibration=FILE`")
        data, seed = TASKS.get("causal-lm").data(loaded, settings, hashed, given, **how), texts.seed
        held_out = self.of_windows(data.held_out, loaded, seed + 1)
        return replace(data, samples=self.of_windows(data.samples, loaded, seed), held_out=held_out)

    def measured(self, loaded: Any, settings: Settings) -> Samples | None:
        windows = TASKS.get("causal-lm").measured(loaded, settings)
        return None if windows is None else self.of_windows(windows, loaded, settings.part(Texts).seed)

    def of_windows(self, windows: Any, loaded: Any, seed: int = 0) -> MaskedWindows:
        """Hide a share of the tokens of each window, at least one, drawn by a seed.

        Raises:
            TwofoldError: if the tokenizer has no mask.
        """
        mask = getattr(need_tokenizer(loaded), "mask_token_id", None)
        if mask is None:
            raise TwofoldError(
                f"the tokenizer of {loaded.name} has no mask token, so nothing can be hidden; use another task"
            )
        drawn = torch.rand(windows.ids.shape, generator=torch.Generator().manual_seed(seed))
        if windows.begin:
            drawn[:, 0] = 2.0  # windows begin with a special token
        count = max(round(SHARE * drawn.shape[1]), 1)
        hidden = drawn <= drawn.kthvalue(count, dim=1, keepdim=True).values if len(drawn) else drawn.bool()
        return MaskedWindows(windows.ids, windows.source, windows.begin, hidden, int(mask))

    def example(self, model: Any) -> Batch:
        ids = example_of(model)["input_ids"]
        return {"input_ids": ids, LABELS: ids}

    def read(self, result: Any, batch: Batch, model: Any) -> Tensor:  # (hidden tokens, vocabulary)
        return at_labels(logits_of(result, model, 3), batch)
