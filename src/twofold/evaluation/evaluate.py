"""How good models are, side by side: on a text, or on tasks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from twofold.errors import TwofoldError
from twofold.evaluation.lm_eval import TaskEvaluation, evaluate_tasks
from twofold.evaluation.on_data import DataEvaluation, evaluate_data
from twofold.evaluation.on_text import Evaluation, evaluate_text
from twofold.model.load import load_model
from twofold.task.data.settings import Columns

ON_TASKS = ("task_folder", "limit", "fewshot", "batch_size", "seed")  # settings of either kind of measuring
OF_ROWS = ("dataset_config", "dataset_split", "text_column", "skip_bad")
ON_TEXT = (*OF_ROWS, "chat", "windows", "window")
COLUMNS = ("audio_column", "image_column", "target_column", "label_column")
ON_DATA = (*OF_ROWS, *COLUMNS, "task", "samples")
KINDS = {"text": ON_TEXT, "tasks": ON_TASKS, "data": ON_DATA}


def evaluate(
    model: str,
    text: str | Sequence[str] | None = None,
    *,
    tasks: str | Sequence[str] | None = None,
    data: str | Sequence[str] | None = None,
    against: str | None = None,
    adapter: str | None = None,
    task_folder: str | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    dataset_config: str | None = None,
    dataset_split: str = "test",
    text_column: str = "text",
    chat: bool = False,
    skip_bad: bool = False,
    windows: int = 16,
    window: int = 1024,
    task: str = "auto",
    samples: int | None = None,
    audio_column: str = "audio",
    image_column: str = "image",
    target_column: str = "target",
    label_column: str = "label",
    bos: Literal["auto", "none"] = "auto",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    dequantize: bool = False,
    quiet: bool = False,
) -> Evaluation | TaskEvaluation | DataEvaluation:
    """Measure a model, and the original beside it: on a text, on tasks of lm-eval, or on data of the model's own kind.

    On a text it is perplexity and divergence; on data the divergence, and the measures of the task: accuracy, WER, BLEU, ranks.

    Args:
        text: text files, or the name of a data set.
        tasks: in its place, names of tasks, as a list or with commas between.
        data: in their place, folders, files or the name of a data set; its columns are named by ``text_column`` and the like.
        against: the original.
        adapter: the folder of a PEFT adapter that is put on the model, and not on the original.
        limit: rows of each task, the first ones; None measures all.
        fewshot: examples before each question; None takes what the task says.
        chat: put rows of a prompt and a completion through the chat template.
        skip_bad: leave out rows of the text that can't be read.
        windows: of the text, the first ones; 0 measures all.
        window: tokens in one.
        task: what the model is for, as it is measured on data; "auto" finds it.
        samples: of the data, the first ones; None measures all.
        dequantize: turn weights that are quantized already into ordinary ones.
        bos: how windows and rows begin: "auto", with the special tokens that the tokenizer begins a text with; "none", without.

    Raises:
        TwofoldError: if a model, the text or a task can't be used, or a setting is of the other kind of measuring.
    """
    settings = {**locals()}
    _check_kind(settings)
    models = [*([(against, None)] if against else []), (model, adapter)]
    load = partial(load_model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, dequantize=dequantize)
    if tasks is not None:
        names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
        return evaluate_tasks(models, load, names, bos=bos, quiet=quiet, **{name: settings[name] for name in ON_TASKS})
    if data is not None:
        columns = Columns(**{name: settings[name] for name in (*OF_ROWS, *COLUMNS)})
        return evaluate_data(models, load, data, task=task, samples=samples, columns=columns, quiet=quiet)
    assert text is not None
    source = {name: settings[name] for name in ON_TEXT}
    return evaluate_text(models, load, text, bos=bos, quiet=quiet, **{**source, "windows": windows or None})


def _check_kind(settings: dict[str, Any]) -> None:
    """Refuse settings of more than one kind of measuring, or of none."""
    if settings["bos"] not in ("auto", "none"):
        raise TwofoldError(f"`bos` must be auto or none, got {settings['bos']!r}")
    given = [kind for kind in KINDS if settings[kind] is not None]
    if len(given) != 1:
        raise TwofoldError(
            "give either `text=FILE` to measure perplexity, `tasks=NAMES` to measure accuracy, or `data=FOLDER` to measure a "
            "model of speech, images, pairs or sentences"
        )
    (here,) = given
    defaults = inspect.signature(evaluate).parameters
    for there, names in KINDS.items():
        for name in sorted(set(names) - set(KINDS[here])):
            if settings[name] != defaults[name].default:
                raise TwofoldError(f"`{name}` goes with `{there}` and not with `{here}`; leave it out")
