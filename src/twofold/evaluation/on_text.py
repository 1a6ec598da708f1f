"""Models measured side by side on a text, with all that the numbers depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pydantic

from twofold.adapters.put import put_adapter
from twofold.calibrate.opened import Opened
from twofold.errors import TwofoldError
from twofold.evaluation.size import disk_bytes, memory_bytes, parameter_count
from twofold.model.load import LoadedModel, check_ids, need_tokenizer, window_limit
from twofold.task.output.quality import Predict, Quality, measure_quality
from twofold.task.text.held_out import evaluation_windows


class EvaluatedModel(pydantic.BaseModel, extra="forbid"):
    """One row."""

    name: str
    perplexity: float
    loss: float  # nats per predicted token
    divergence: float | None  # from the first model, nats per token
    agreement: float | None
    parameters: int
    memory: int  # bytes
    disk: int | None  # bytes


class Evaluation(pydantic.BaseModel, extra="forbid"):
    """The original first, if it was given."""

    text: str
    windows: int
    window: int
    predicted_tokens: int
    begin: str = ""  # the special tokens that each window begins with
    models: list[EvaluatedModel]


def evaluate_text(
    models: Sequence[tuple[str, str | None]],
    load: Callable[[str], LoadedModel],
    text: str | Sequence[str],
    *,
    window: int,
    quiet: bool,
    **source: Any,
) -> Evaluation:
    """Measure models on a text; divergence and agreement are from the first one.

    Args:
        models: names, each with the folder of an adapter that is put on it.
        source: the other settings of ``evaluation_windows``.

    Raises:
        TwofoldError: if a model or the text can't be used, or two models do not share a vocabulary.
    """
    loaded = [load(name) for name, _ in models]
    for model, (_, adapter) in zip(loaded, models, strict=True):
        if adapter is not None:
            put_adapter(model, adapter)
    longest = min((p for p in (window_limit(model.model) for model in loaded) if p is not None), default=window)
    task = Opened(loaded[-1]).need_task("evaluated on a text")
    if not task.streams:
        raise TwofoldError(
            f"{type(loaded[-1].model).__name__} is for {task.name}, which is not measured on a text; name what it reads with "
            "`data=FOLDER` in the place of `text`"
        )
    if len({getattr(model.model.config.get_text_config(), "vocab_size", None) for model in loaded}) > 1:
        raise TwofoldError(
            f"{models[0][0]} and {models[-1][0]} have different vocabularies, so their predictions can't be compared"
        )
    samples = evaluation_windows(text, need_tokenizer(loaded[-1]), window=min(window, longest), **source)
    if window > longest:  # told after what is wrong with the text
        raise TwofoldError(f"`window={window}` is longer than this model's {longest} positions; use `window={longest}`")
    for model in loaded:
        check_ids(samples.ids, model)
    windows = task.of_windows(samples, loaded[-1])

    def predict(model: LoadedModel) -> Predict:
        return lambda i: task.outputs(model.model, windows.batch(i, i + 1))

    qualities = measure_quality([predict(model) for model in loaded], windows, task, quiet=quiet)
    return Evaluation(
        text=", ".join(Path(name).name for name in ([text] if isinstance(text, str) else text)),
        windows=samples.shape[0],
        window=samples.shape[1],
        predicted_tokens=qualities[0].tokens,
        begin=samples.begin,
        models=[
            _row(model, quality, adapter)
            for model, quality, (_, adapter) in zip(loaded, qualities, models, strict=True)
        ],
    )


def _row(loaded: LoadedModel, quality: Quality, adapter: str | None) -> EvaluatedModel:
    """Put together what was measured of a model; its adapter counts to its size on disk."""
    disk = disk_bytes(loaded.source)
    if adapter is not None and disk is not None:
        disk += disk_bytes(Path(adapter).expanduser()) or 0
    sizes: dict[str, Any] = {
        "parameters": parameter_count(loaded.model),
        "memory": memory_bytes(loaded.model),
        "disk": disk,
    }
    scores = {name: score for name, score in vars(quality).items() if name != "tokens"}
    return EvaluatedModel(name=loaded.name, **scores, **sizes)
