"""Models measured side by side on a text, with all that the numbers depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pydantic

from twofold.adapters.put import put_adapter
from twofold.calibrate.opened import need_task
from twofold.errors import TwofoldError
from twofold.evaluation.size import model_size, weight_bytes
from twofold.model.load import LoadedModel, check_ids, need_tokenizer, positions
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
    models: list[EvaluatedModel]


def evaluate_text(
    models: Sequence[tuple[str, str | None]],
    load: Callable[[str], LoadedModel],
    text: str | Sequence[str],
    *,
    dataset_config: str | None = None,
    dataset_split: str = "test",
    text_column: str = "text",
    windows: int | None = 16,
    window: int = 1024,
    quiet: bool = False,
) -> Evaluation:
    """Measure models on a text; divergence and agreement are from the first one.

    Args:
        models: names, each with the folder of an adapter that is put on it.

    Raises:
        TwofoldError: if a model or the text can't be used, or two models do not share a vocabulary.
    """
    names = [name for name, _ in models]
    loaded = [load(name) for name in names]
    added = [0] * len(models)
    for number, (_, adapter) in enumerate(models):
        if adapter is not None:
            put_adapter(loaded[number], adapter)
            added[number] = weight_bytes(Path(adapter).expanduser())
    longest = min((p for p in (positions(one.model) for one in loaded) if p is not None), default=window)
    if window > longest:
        raise TwofoldError(f"`window={window}` is longer than this model's {longest} positions; use `window={longest}`")
    task = need_task(loaded[-1], "evaluated on a text")
    sizes = {getattr(one.model.config.get_text_config(), "vocab_size", None) for one in loaded}
    if len(sizes) > 1:
        raise TwofoldError(
            f"{names[0]} and {names[-1]} have different vocabularies, so their predictions can't be compared"
        )
    samples = evaluation_windows(
        text,
        need_tokenizer(loaded[-1]),
        window=window,
        windows=windows,
        dataset_config=dataset_config,
        dataset_split=dataset_split,
        text_column=text_column,
    )
    check_ids(samples.ids, loaded[-1])

    def predict(one: LoadedModel) -> Predict:
        return lambda i: task.outputs(one.model, samples.batch(i, i + 1))

    qualities = measure_quality([predict(one) for one in loaded], samples, task, quiet=quiet)
    return Evaluation(
        text=", ".join(Path(source).name for source in ([text] if isinstance(text, str) else text)),
        windows=samples.shape[0],
        window=samples.shape[1],
        predicted_tokens=qualities[0].tokens,
        models=[_row(*measured) for measured in zip(loaded, qualities, added, strict=True)],
    )


def _row(loaded: LoadedModel, quality: Quality, added: int) -> EvaluatedModel:
    """Return the row of a model.

    Args:
        added: bytes on disk of what was put on it.
    """
    size = model_size(loaded.model, loaded.source)
    return EvaluatedModel(
        name=loaded.name,
        perplexity=quality.perplexity,
        loss=quality.loss,
        divergence=quality.divergence,
        agreement=quality.agreement,
        parameters=size.parameters,
        memory=size.memory,
        disk=None if size.disk is None else size.disk + added,
    )
