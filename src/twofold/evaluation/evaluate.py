"""How good models are, side by side: on a text, or on tasks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Literal

from twofold.errors import TwofoldError
from twofold.evaluation.lm_eval import TaskEvaluation, evaluate_tasks
from twofold.evaluation.on_text import Evaluation, evaluate_text
from twofold.model.load import load_model

ON_TASKS = ("task_folder", "limit", "fewshot", "batch_size", "seed")  # settings of either kind of measuring
ON_TEXT = ("dataset_config", "dataset_split", "text_column", "chat", "skip_bad", "windows", "window")


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
    chat: bool = False,
    skip_bad: bool = False,
    windows: int = 16,
    window: int = 1024,
    bos: Literal["auto", "none"] = "auto",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    dequantize: bool = False,
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
        chat: put rows of a prompt and a completion through the chat template.
        skip_bad: leave out rows of the text that can't be read.
        windows: of the text, the first ones; 0 measures all.
        window: tokens in one.
        dequantize: turn weights that are quantized already into ordinary ones.
        bos: how windows and the rows of tasks begin: "auto", with the special tokens that the tokenizer begins a text with, if it
            does; "none", without.

    Raises:
        TwofoldError: if a model, the text or a task can't be used, or a setting is of the other kind of measuring.
    """
    settings = {**locals()}
    if bos not in ("auto", "none"):
        raise TwofoldError(f"`bos` must be auto or none, got {bos!r}")
    if (text is None) == (tasks is None):
        raise TwofoldError("give either `text=FILE` to measure perplexity, or `tasks=NAMES` to measure accuracy")
    here, there, foreign = ("text", "tasks", ON_TASKS) if tasks is None else ("tasks", "text", ON_TEXT)
    defaults = inspect.signature(evaluate).parameters
    for name in foreign:
        if settings[name] != defaults[name].default:
            raise TwofoldError(f"`{name}` goes with `{there}` and not with `{here}`; leave it out")
    models = [*([(against, None)] if against else []), (model, adapter)]
    load = partial(load_model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, dequantize=dequantize)
    if tasks is not None:
        names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
        return evaluate_tasks(models, load, names, bos=bos, quiet=quiet, **{name: settings[name] for name in ON_TASKS})
    assert text is not None
    source = {name: settings[name] for name in ON_TEXT}
    return evaluate_text(models, load, text, bos=bos, quiet=quiet, **{**source, "windows": windows or None})
