"""What ``twofold eval --tasks`` prints."""

from __future__ import annotations

from twofold.cli.tables import table
from twofold.evaluation.lm_eval import TaskEvaluation, TaskScores


def print_tasks(result: TaskEvaluation) -> None:
    """Each task and the mean, the models side by side."""
    first = result.models[0]
    rows = [
        [score.task, score.metric, str(score.rows), *(_score(model.tasks[place]) for model in result.models)]
        for place, score in enumerate(first.tasks)
    ]
    means = [model.mean for model in result.models if model.mean is not None]
    if len(means) == len(result.models):
        rows.append(["mean", "", "", *(f"{mean:.4f}" for mean in means)])
        if len(means) > 1 and means[0] > 0:
            rows.append(["of the original", "", "", *(f"{mean / means[0]:.4f}" for mean in means)])
    else:
        rows.append(["mean", "none: not all are better if higher", "", *("–" for _ in result.models)])
    title = f"lm-eval {result.lm_eval}" + (f", {result.limit} rows of each task" if result.limit else "")
    table(title, ["task", "metric", "rows", *(model.name for model in result.models)], rows)


def _score(score: TaskScores) -> str:
    error = "" if score.standard_error is None else f" ± {score.standard_error:.4f}"
    return f"{score.value:.4f}{error}"
