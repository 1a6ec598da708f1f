"""twofold eval: perplexity, divergence, agreement and sizes, or accuracy on tasks, side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

TASK_FLAGS = ("task_folder", "limit", "fewshot", "batch_size", "seed")
TEXT_FLAGS = ("dataset_config", "dataset_split", "text_column", "windows", "window")


def command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or smollm2.")],
    text: Annotated[list[str] | None, typer.Option(help="Text files or a data set name to measure on.")] = None,
    against: Annotated[str | None, typer.Option(help="The original model to compare with.")] = None,
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
    windows: Annotated[int, typer.Option(min=0, help="Windows to measure on; 0 means all.")] = 16,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of the computation; auto is float32 on a processor.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Measure a model on a text (perplexity, sizes, with --against the divergence from the original) or on tasks of lm-eval."""
    from twofold.cli.tables import print_evaluation
    from twofold.cli.task_tables import print_tasks
    from twofold.errors import TwofoldError
    from twofold.evaluation.lm_eval import TaskEvaluation, evaluate_tasks
    from twofold.evaluation.side_by_side import Evaluation, evaluate_models

    if (text is None) == (tasks is None):
        raise TwofoldError("give --text FILE to measure perplexity, or --tasks NAMES to measure accuracy")
    of_the_other = TASK_FLAGS if tasks is None else TEXT_FLAGS
    sources = {name: context.get_parameter_source(name) for name in of_the_other}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        there, here = ("--tasks", "--text") if tasks is None else ("--text", "--tasks")
        raise TwofoldError(f"--{given[0].replace('_', '-')} goes with {there} and not with {here}; leave it out")
    loading: dict[str, Any] = {
        "against": against,
        "adapter": adapter,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "quiet": quiet,
    }
    result: Evaluation | TaskEvaluation
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        result = evaluate_tasks(
            model, names, task_folder=task_folder, limit=limit, fewshot=fewshot, batch_size=batch_size, seed=seed, **loading
        )  # fmt: skip
        show: Any = print_tasks
    else:
        assert text is not None
        result = evaluate_models(
            model,
            text,
            dataset_config=dataset_config,
            dataset_split=dataset_split,
            text_column=text_column,
            windows=windows or None,
            window=window,
            **loading,
        )
        show = print_evaluation
    if json_output:
        print(result.model_dump_json(indent=1))
    else:
        show(result)
