"""Models measured side by side on clips, images, pairs or sentences: divergence, agreement, and the measures of their task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pydantic

from twofold.adapters.put import put_adapter
from twofold.calibrate.opened import Opened
from twofold.errors import TwofoldError
from twofold.evaluation.size import disk_bytes, memory_bytes, parameter_count
from twofold.model.load import LoadedModel
from twofold.task.data.examples import ExampleTask
from twofold.task.data.settings import Columns
from twofold.task.output.quality import Predict, measure_quality


class MeasuredModel(pydantic.BaseModel, extra="forbid"):
    """One row."""

    name: str
    loss: float | None  # nats a prediction, where the data says what is right
    perplexity: float | None
    divergence: float | None  # from the first model, nats a prediction
    agreement: float | None  # with the first model
    scores: dict[str, float]  # the task's own measures: accuracy, wer, bleu
    parameters: int
    memory: int  # bytes
    disk: int | None  # bytes


class DataEvaluation(pydantic.BaseModel, extra="forbid"):
    """The original first, if it was given."""

    data: str
    task: str
    samples: int
    unit: str  # of samples, in words
    predictions: int
    agreement: str  # what it is, in words
    models: list[MeasuredModel]


def evaluate_data(
    models: Sequence[tuple[str, str | None]],
    load: Callable[[str], LoadedModel],
    data: str | Sequence[str],
    *,
    task: str,
    samples: int | None,
    columns: Columns,
    quiet: bool,
) -> DataEvaluation:
    """Measure models on data; divergence and agreement are from the first one, whose processor and transcripts all are given.

    Args:
        models: names, each with the folder of an adapter that is put on it.
        task: what the models are for; "auto" finds it.
        samples: how many at the most; None for all.

    Raises:
        TwofoldError: if a model or the data can't be used.
    """
    loaded = [load(name) for name, _ in models]
    for model, (_, adapter) in zip(loaded, models, strict=True):
        if adapter is not None:
            put_adapter(model, adapter)
    what = Opened(loaded[0], named=task).need_task("measured on data")
    if not isinstance(what, ExampleTask):
        raise TwofoldError(f"{what.name} is measured on a text: name it with `text=FILE` in the place of `data`")
    examples = what.samples_of([data] if isinstance(data, str) else data, loaded[0], columns, samples, quiet=quiet)

    def predict(model: LoadedModel) -> Predict:
        return lambda i: what.outputs(model.model, examples.batch(i, i + 1))

    qualities = measure_quality([predict(model) for model in loaded], examples, what, quiet=quiet)
    rows = []
    for model, quality, (_, adapter) in zip(loaded, qualities, models, strict=True):
        disk = disk_bytes(model.source)
        if adapter is not None and disk is not None:
            disk += disk_bytes(Path(adapter).expanduser()) or 0
        sizes: dict[str, Any] = {
            "parameters": parameter_count(model.model), "memory": memory_bytes(model.model), "disk": disk
        }  # fmt: skip
        measured = {name: getattr(quality, name) for name in ("loss", "perplexity", "divergence", "agreement")}
        rows.append(MeasuredModel(name=model.name, scores=what.score(model, examples), **measured, **sizes))
    return DataEvaluation(
        data=examples.source, task=what.name, samples=len(examples), unit=examples.unit,
        predictions=examples.predictions, agreement=what.output.agreement, models=rows,
    )  # fmt: skip
