"""Accuracy on tasks, by lm-eval, of models one after another."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pydantic

from twofold.adapters.put import put_adapter
from twofold.errors import TwofoldError
from twofold.host.progress import say
from twofold.host.quiet import first_line, quiet_bars, silence
from twofold.model.load import LoadedModel, need_tokenizer
from twofold.task.text.special import pad_id

MISSING = "`tasks` needs lm-eval, which is not installed; install it with: pip install 'twofold[lm-eval]'"
BOOTSTRAP = 1000  # draws for the standard error of metrics that have no formula for it
FIRST = ("acc", "exact_match", "f1")  # the metric that stands for a task, where it has one of these


class TaskScores(pydantic.BaseModel, extra="forbid"):
    """One task, as one model does it."""

    task: str
    rows: int
    metric: str  # the one that stands for the task
    value: float
    standard_error: float | None
    higher_is_better: bool
    metrics: dict[str, float]  # all that lm-eval gives


class ScoredModel(pydantic.BaseModel, extra="forbid"):
    """One model on all tasks."""

    name: str
    tasks: list[TaskScores]
    mean: float | None  # of the tasks' values, where all of them are better if higher


class TaskEvaluation(pydantic.BaseModel, extra="forbid"):
    """The original first, if it was given."""

    lm_eval: str  # its version
    limit: int | None
    fewshot: int | None
    seed: int
    bos: str = "auto"  # "none": no row begins with the special tokens of the tokenizer
    models: list[ScoredModel]


def evaluate_tasks(
    models: Sequence[tuple[str, str | None]],
    load: Callable[[str], LoadedModel],
    tasks: Sequence[str],
    *,
    task_folder: str | None,
    limit: int | None,
    fewshot: int | None,
    batch_size: int,
    seed: int,
    bos: str,
    quiet: bool,
) -> TaskEvaluation:
    """Measure models on tasks of lm-eval.

    Args:
        models: names, each with the folder of an adapter that is put on it.
        bos: "auto" leaves it to lm-eval, which has rows begin as the tokenizer begins texts; "none" has them begin with text.
        task_folder: of YAML files of your own tasks, as ``lm_eval --include_path`` takes it; lm-eval's own are known too.

    Raises:
        TwofoldError: if lm-eval is not installed, there is no such task, or a model can't be used.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise TwofoldError(MISSING)
    if not tasks:
        raise TwofoldError("`tasks` names no task; give some with commas between, as arc_easy,piqa")
    if task_folder is not None and not Path(task_folder).is_dir():
        raise TwofoldError(f"there is no folder {task_folder}; `task_folder` names one with the YAML files of tasks")
    with silence(), silence("lm_eval"):
        import lm_eval

        manager = _manager(tasks, task_folder)
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
        run = partial(
            lm_eval.simple_evaluate, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=fewshot,
            bootstrap_iters=BOOTSTRAP, log_samples=False, **seeds,
        )  # fmt: skip
    rows: list[ScoredModel] = []
    for name, adapter in models:
        if not quiet:
            say(f"{name}: {', '.join(tasks)}")
        loaded = load(name)
        if adapter is not None:
            put_adapter(loaded, adapter)
        reader = {"batch_size": batch_size, "add_bos_token": False if bos == "none" else None}
        rows.append(_score(loaded, tasks, run, reader))
        del loaded  # before the next one is read
        gc.collect()
    return TaskEvaluation(lm_eval=lm_eval.__version__, limit=limit, fewshot=fewshot, seed=seed, bos=bos, models=rows)


def _manager(tasks: Sequence[str], folder: str | None) -> Any:
    """Return lm-eval's table of tasks; its own thousands are read only if the user's folder lacks some that are asked for."""
    from lm_eval.tasks import TaskManager

    absent = ""
    for defaults in (True,) if folder is None else (False, True):
        try:
            manager = TaskManager(include_path=folder, include_defaults=defaults)
        except Exception as error:  # whatever a YAML file of the user's leads to
            raise TwofoldError(f"the tasks in {folder} can't be read ({first_line(error)})") from error
        absent = next((task for task in tasks if task not in manager.all_tasks), "")
        if not absent:
            return manager
    raise TwofoldError(
        f"lm-eval has no task {absent}; list them with: lm-eval ls tasks, or give your own with `task_folder`"
    )


def _score(
    loaded: LoadedModel, tasks: Sequence[str], run: Callable[..., dict[str, Any]], reader: dict[str, Any]
) -> ScoredModel:
    """Measure one model by lm-eval's own loop.

    Args:
        reader: how lm-eval reads rows.
    """
    from lm_eval.models.huggingface import HFLM

    tokenizer, model = need_tokenizer(loaded), loaded.model
    # lm-eval would add a token beyond the model's table where the tokenizer has none
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id(tokenizer, model))
    try:
        with silence("lm_eval"), quiet_bars():
            results = run(model=HFLM(pretrained=model, tokenizer=tokenizer, device=str(model.device), **reader))
    except TwofoldError:
        raise
    except Exception as error:  # a data set that is not on disk, a package that a task needs, an architecture …
        raise TwofoldError(
            f"lm-eval could not measure {loaded.name} on {', '.join(tasks)} ({type(error).__name__}: {first_line(error)}); most "
            "tasks fetch a data set from the hub: see that it can be reached, or give tasks on local files with `task_folder`"
        ) from error
    scores = [_task(name, results) for name in dict.fromkeys(tasks)]
    comparable = all(score.higher_is_better for score in scores)
    mean = sum(score.value for score in scores) / len(scores) if comparable else None
    return ScoredModel(name=loaded.name, tasks=scores, mean=mean)


def _task(name: str, results: dict[str, Any]) -> TaskScores:
    """Find the scores of a task that was asked for; of a group its own aggregate, or else the mean over its tasks.

    lm-eval keys its numbers by metric and filter, with a comma between; beside a group it gives the tasks of it.
    """
    leaves = _leaves(name, results.get("group_subtasks", {}))
    values = results["results"].get(name, {})
    metrics = _numbers(values)
    if not metrics:
        parts = [_numbers(results["results"].get(leaf, {})) for leaf in leaves]
        shared = [key for key in parts[0] if all(key in part for part in parts)]
        metrics = {key: sum(part[key] for part in parts) / len(parts) for key in shared}
    if not metrics:
        raise TwofoldError(f"the task {name} gives no number that its parts share; name its parts instead")
    ranks = {metric: place for place, metric in enumerate(FIRST)}
    first = min(metrics, key=lambda key: ranks.get(key.split(",")[0], len(FIRST)))
    metric, _, filtered = first.partition(",")
    error = values.get(f"{metric}_stderr,{filtered}")
    counts = results.get("n-samples", {})
    return TaskScores(
        task=name,
        rows=sum(int(counts.get(leaf, {}).get("effective", 0)) for leaf in leaves),
        metric=metric,
        value=metrics[first],
        standard_error=float(error) if isinstance(error, int | float) else None,
        higher_is_better=all(results.get("higher_is_better", {}).get(leaf, {}).get(metric) for leaf in leaves),
        metrics=metrics,
    )


def _leaves(name: str, groups: dict[str, list[str]]) -> list[str]:
    """Return the tasks of a group and of the groups in it; a task is its own."""
    if not groups.get(name):
        return [name]
    return [leaf for part in groups[name] for leaf in _leaves(part, groups)]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the metrics alone, without their standard errors and without words."""
    scores = {key: value for key, value in values.items() if "," in key and "_stderr" not in key}
    return {key: float(value) for key, value in scores.items() if isinstance(value, int | float)}
