"""twofold evaluate: perplexity, divergence, agreement and sizes, or accuracy on tasks, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

import twofold
from twofold.cli.flags import Against, Dequantize, Device, Dtype, Json, Model, Quiet, Trust
from twofold.cli.tables import megabytes, millions, number, run_command, table

if TYPE_CHECKING:
    from twofold.evaluation.lm_eval import TaskEvaluation, TaskScores
    from twofold.evaluation.on_data import DataEvaluation
    from twofold.evaluation.on_text import Evaluation


def command(
    model: Model,
    text: Annotated[list[str] | None, typer.Option(help="Text files or a data set name to measure on.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="In their place, a folder, files or a data set of clips, images, pairs or sentences."),
    ] = None,
    against: Against = None,
    adapter: Annotated[str | None, typer.Option(help="The folder of an adapter, put on MODEL.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, with commas between, in place of --text.")
    ] = None,
    task_folder: Annotated[str | None, typer.Option(help="A folder with the YAML files of your own tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task; all without it.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a task at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the examples before a question.")] = 0,
    dataset_config: Annotated[str | None, typer.Option(help="The configuration of the data set.")] = None,
    dataset_split: Annotated[str, typer.Option(help="The split of the data set.")] = "test",
    text_column: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompt and completion rows through the chat template, as one turn each.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that can't be read, and count them.")
    ] = False,
    windows: Annotated[int, typer.Option(min=0, help="Windows to measure on; 0 means all.")] = 16,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    task: Annotated[str, typer.Option(help="What the model is for, with --data; auto finds it.")] = "auto",
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of --data; all without it.")] = None,
    audio_column: Annotated[str, typer.Option(help="The field that holds the audio, or names its file.")] = "audio",
    image_column: Annotated[str, typer.Option(help="The field that holds the image, or names its file.")] = "image",
    target_column: Annotated[str, typer.Option(help="The field that holds the second text of a pair.")] = "target",
    label_column: Annotated[str, typer.Option(help="The field that holds the label.")] = "label",
    bos: Annotated[
        str, typer.Option(help="How windows begin: auto, as the tokenizer begins texts; none, with text.")
    ] = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    dequantize: Dequantize = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on a text (perplexity, with --against divergence from the original), on tasks of lm-eval, or on data."""
    flags = {**locals()}
    run_command(twofold.evaluate, flags, print_tasks if tasks else print_data if data else print_evaluation)


def print_evaluation(result: Evaluation) -> None:
    """Print the models side by side."""
    first, many = result.models[0], len(result.models) > 1
    rows = []
    for m in result.models:
        ratio = f"{m.perplexity / first.perplexity:.4f}"
        compared = [ratio, number(m.divergence, ".4f"), number(m.agreement, ".1%")] if many else []
        sizes = [millions(m.parameters), megabytes(m.memory), megabytes(m.disk)]
        rows.append([m.name, f"{m.perplexity:.3f}", *compared, *sizes])
    columns = ["× original", "divergence", "same token"] if many else []
    begin = f", each beginning with {result.begin}" if result.begin else ""
    title = f"{result.text}: {result.windows} windows of {result.window} tokens{begin}"
    table(title, ["model", "perplexity", *columns, "parameters", "memory", "disk"], rows)


def print_data(result: DataEvaluation) -> None:
    """Print the models side by side, with the measures of their task."""
    many, scores = len(result.models) > 1, list(result.models[0].scores)
    rows = []
    for m in result.models:
        compared = [number(m.divergence, ".5f"), number(m.agreement, ".2%")] if many else []
        sizes = [millions(m.parameters), megabytes(m.memory), megabytes(m.disk)]
        known = [number(m.perplexity, ".3f")] if result.models[0].perplexity is not None else []
        rows.append([m.name, *(f"{m.scores[name]:.4f}" for name in scores), *known, *compared, *sizes])
    columns = [*(name.replace("_", " ") for name in scores)]
    columns += ["perplexity"] if result.models[0].perplexity is not None else []
    columns += ["divergence", result.agreement] if many else []
    title = f"{result.data}: {result.samples} {result.unit}, {result.predictions} predictions ({result.task})"
    table(title, ["model", *columns, "parameters", "memory", "disk"], rows)


def print_tasks(result: TaskEvaluation) -> None:
    """Print each task and the mean, the models side by side."""
    rows: list[list[object]] = [
        [score.task, score.metric, score.rows, *(_score(model.tasks[place]) for model in result.models)]
        for place, score in enumerate(result.models[0].tasks)
    ]
    means = [model.mean for model in result.models if model.mean is not None]
    if len(means) == len(result.models):
        rows.append(["mean", "", "", *(f"{mean:.4f}" for mean in means)])
        if len(means) > 1 and means[0] > 0:
            rows.append(["of the original", "", "", *(f"{mean / means[0]:.4f}" for mean in means)])
    else:
        rows.append(["mean", "none: not all are better if higher", "", *("–" for _ in result.models)])
    title = f"lm-eval {result.lm_eval}" + (f", {result.limit} rows of each task" if result.limit else "")
    title += "" if result.bos == "auto" else ", rows that begin without special tokens"
    table(title, ["task", "metric", "rows", *(model.name for model in result.models)], rows)


def _score(score: TaskScores) -> str:
    error = "" if score.standard_error is None else f" ± {score.standard_error:.4f}"
    return f"{score.value:.4f}{error}"
