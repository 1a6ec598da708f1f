"""twofold eval: perplexity, divergence, agreement and sizes, side by side."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or smollm2.")],
    text: Annotated[list[str], typer.Option(help="Text files or a data set name to measure on.")],
    against: Annotated[str | None, typer.Option(help="The original model to compare with.")] = None,
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
    """Measure a model on a text: perplexity, sizes, and with --against the divergence from the original."""
    from twofold.cli.tables import print_evaluation
    from twofold.evaluation import evaluate_models

    result = evaluate_models(
        model,
        text,
        against=against,
        dataset_config=dataset_config,
        dataset_split=dataset_split,
        text_column=text_column,
        windows=windows or None,
        window=window,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
    if json_output:
        print(result.model_dump_json(indent=1))
    else:
        print_evaluation(result)
