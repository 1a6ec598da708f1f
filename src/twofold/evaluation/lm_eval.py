"""Accuracy on tasks, by lm-eval, of models one after another."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic

from twofold.adapters.put import put_adapter
from twofold.errors import TwofoldError
from twofold.host.progress import say
from twofold.host.quiet import first_line, quiet_bars, silence
from twofold.model.load import LoadedModel, need_tokenizer

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
    models: list[ScoredModel]


def evaluate_tasks(
    models: Sequence[tuple[str, str | None]],
    load: Callable[[str], LoadedModel],
    tasks: Sequence[str],
    *,
    task_folder: str | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    quiet: bool = False,
) -> TaskEvaluation:
    """Measure models on tasks of lm-eval.

    Args:
        models: names, each with the folder of an adapter that is put on it.
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
    with silence(), _quiet():
        import lm_eval

        manager = _manager(tasks, task_folder)
    rows: list[ScoredModel] = []
    for name, adapter in models:
        if not quiet:
            say(f"{name}: {', '.join(tasks)}")
        loaded = load(name)
        if adapter is not None:
            put_adapter(loaded, adapter)
        rows.append(_score(loaded, list(tasks), manager, limit, fewshot, batch_size, seed))
        del loaded  # before the next one is read
        gc.collect()
    return TaskEvaluation(lm_eval=lm_eval.__version__, limit=limit, fewshot=fewshot, seed=seed, models=rows)


def _manager(tasks: Sequence[str], folder: str | None) -> Any:
    """lm-eval's table of tasks; its own thousands are read only if the user's folder has not all that are asked for."""
    from lm_eval.tasks import TaskManager

    absent = ""
    for defaults in (False, True):
        if folder is None and not defaults:
            continue
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
    loaded: LoadedModel,
    tasks: list[str],
    manager: Any,
    limit: int | None,
    fewshot: int | None,
    batch_size: int,
    seed: int,
) -> ScoredModel:
    """One model, by lm-eval's own loop."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = need_tokenizer(loaded)
    try:
        with _quiet(), quiet_bars():
            runner = HFLM(
                pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size, device=str(loaded.model.device)
            )
            found = simple_evaluate(
                model=runner, tasks=tasks, task_manager=manager, limit=limit, num_fewshot=fewshot, bootstrap_iters=BOOTSTRAP,
                log_samples=False, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
                fewshot_random_seed=seed,
            )  # fmt: skip
    except TwofoldError:
        raise
    except Exception as error:  # a data set that is not on disk, a package that a task needs, an architecture …
        raise TwofoldError(
            f"lm-eval could not measure {loaded.name} on {', '.join(tasks)} ({type(error).__name__}: {first_line(error)}); most "
            "tasks fetch a data set from the hub: see that it can be reached, or give tasks on local files with `task_folder`"
        ) from error
    scores = [_task(name, found) for name in dict.fromkeys(tasks)]
    comparable = all(score.higher_is_better for score in scores)
    mean = sum(score.value for score in scores) / len(scores) if comparable else None
    return ScoredModel(name=loaded.name, tasks=scores, mean=mean)


def _task(name: str, found: dict[str, Any]) -> TaskScores:
    """What stands for a task that was asked for; for a group its own aggregate, or else the mean over its tasks.

    lm-eval keys its numbers by metric and filter, with a comma between; beside a group it gives the tasks of it.
    """
    leaves = _leaves(name, found.get("group_subtasks", {}))
    values = found["results"].get(name, {})
    metrics = _numbers(values)
    if not metrics:
        each = [_numbers(found["results"].get(leaf, {})) for leaf in leaves]
        shared = [key for key in each[0] if all(key in one for one in each)]
        metrics = {key: sum(one[key] for one in each) / len(each) for key in shared}
    if not metrics:
        raise TwofoldError(f"the task {name} gives no number that its parts share; name its parts instead")
    ranks = {metric: place for place, metric in enumerate(FIRST)}
    first = min(metrics, key=lambda key: ranks.get(key.split(",")[0], len(FIRST)))
    metric, _, chosen = first.partition(",")
    error = values.get(f"{metric}_stderr,{chosen}")
    better = [found.get("higher_is_better", {}).get(leaf, {}).get(metric) for leaf in leaves]
    counts = found.get("n-samples", {})
    return TaskScores(
        task=name,
        rows=sum(int(counts.get(leaf, {}).get("effective", 0)) for leaf in leaves),
        metric=metric,
        value=metrics[first],
        standard_error=float(error) if isinstance(error, int | float) else None,
        higher_is_better=all(better),
        metrics=metrics,
    )


def _leaves(name: str, groups: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, of its groups too; of a task itself."""
    if not groups.get(name):
        return [name]
    return [leaf for part in groups[name] for leaf in _leaves(part, groups)]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in values.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs to the root of its own tree; errors alone are let through."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
