"""How good models are, side by side: on a text, or on tasks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

from twofold.errors import TwofoldError
from twofold.evaluation.lm_eval import TaskEvaluation, evaluate_tasks
from twofold.evaluation.on_text import Evaluation, evaluate_text
from twofold.model.load import load_model


def evaluate(
    model: str,
    text: str | Sequence[str] | None = None,
    *,
    tasks: str | Sequence[str] | None = None,
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
    windows: int = 16,
    window: int = 1024,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Evaluation | TaskEvaluation:
    """Measure a model, and the original beside it: perplexity and divergence on a text, or accuracy on tasks of lm-eval.

    Args:
        text: text files, or the name of a data set.
        tasks: in its place, names of tasks, as a list or with commas between.
        against: the original.
        adapter: the folder of a PEFT adapter that is put on the model, and not on the original.
        limit: rows of each task, the first ones; None measures all.
        fewshot: examples before each question; None takes what the task says.
        windows: of the text, the first ones; 0 measures all.
        window: tokens in one.

    Raises:
        TwofoldError: if a model, the text or a task can't be used, or a setting is of the other kind of measuring.
    """
    if (text is None) == (tasks is None):
        raise TwofoldError("give either `text=FILE` to measure perplexity, or `tasks=NAMES` to measure accuracy")
    of_tasks: dict[str, Any] = {
        "task_folder": task_folder, "limit": limit, "fewshot": fewshot, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    of_text: dict[str, Any] = {
        "dataset_config": dataset_config, "dataset_split": dataset_split, "text_column": text_column, "windows": windows,
        "window": window,
    }  # fmt: skip
    defaults = inspect.signature(evaluate).parameters
    for name, value in (of_tasks if tasks is None else of_text).items():
        if value != defaults[name].default:
            there, here = ("tasks", "text") if tasks is None else ("text", "tasks")
            raise TwofoldError(f"`{name}` goes with `{there}` and not with `{here}`; leave it out")
    models = [*([(against, None)] if against else []), (model, adapter)]
    load = partial(load_model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if tasks is not None:
        names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
        return evaluate_tasks(models, load, names, quiet=quiet, **of_tasks)
    assert text is not None
    return evaluate_text(models, load, text, quiet=quiet, **{**of_text, "windows": windows or None})
