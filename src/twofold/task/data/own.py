"""A task of a caller's own, made of two functions: what the model predicts for a batch, and what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.settings.base import Settings
from twofold.task import Batch, Data, Task
from twofold.task.data.example import example_of
from twofold.task.data.examples import Example, Examples, set_aside
from twofold.task.output import Output
from twofold.task.output.categorical import CATEGORICAL
from twofold.task.output.gaussian import GAUSSIAN

OUTPUTS: dict[str, Output] = {output.name: output for output in (CATEGORICAL, GAUSSIAN)}


class OwnTask(Task):
    """What a caller's functions say that a model is for. It has no name by which another run could find it."""

    name = "own"
    settings = Settings

    def __init__(
        self,
        outputs: Callable[[Any, Batch], Tensor],
        labels: Callable[[Batch], Tensor | None] | None = None,
        output: Literal["categorical", "gaussian"] = "categorical",
    ) -> None:
        """
        Args:
            outputs: from the model and a batch to what it predicts (predictions, k), with its graph.
            labels: from a batch to what is right for each prediction, −1 where nothing is known.
            output: what the numbers mean: logits, or features with noise of variance 1.

        Raises:
            TwofoldError: if there is no such meaning.
        """
        if output not in OUTPUTS:
            raise TwofoldError(f"`output` must be {' or '.join(OUTPUTS)}, got {output!r}")
        self._outputs, self._labels, self._kind = outputs, labels, OUTPUTS[output]

    @property
    def output(self) -> Output:  # type: ignore[override]
        return self._kind

    def data(
        self,
        loaded: Any,
        settings: Settings,
        hashed: str,
        given: Iterable[Any] | None = None,
        *,
        held_out: int,
        quiet: bool = False,
    ) -> Data:
        found = []
        for number, batch in enumerate(given or (), 1):
            if not isinstance(batch, Mapping) or not all(isinstance(each, Tensor) for each in batch.values()):
                raise TwofoldError(
                    f"sample {number} must be a dictionary of tensors, the arguments of the model's forward"
                )
            with torch.no_grad():
                found.append(Example(dict(batch), len(self.outputs(loaded.model, batch))))
        if not found:
            raise TwofoldError("there are no samples to calibrate on; give some")
        return set_aside(Examples(tuple(found), "given samples", "samples"), len(found), held_out, ())

    def measured(self, loaded: Any, settings: Settings) -> None:
        return None

    def example(self, model: Any) -> Batch:
        return example_of(model)

    def call(self, module: Any, batch: Batch) -> Any:
        return self._outputs(module, batch)

    def read(self, result: Any, batch: Batch, model: Any) -> Tensor:
        if not isinstance(result, Tensor) or result.dim() != 2:
            raise TwofoldError("`outputs` must give a tensor (predictions, k)")
        return result

    def labels(self, batch: Batch) -> Tensor | None:
        return None if self._labels is None else self._labels(batch)
