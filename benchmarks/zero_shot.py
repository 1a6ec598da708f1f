"""Accuracy on ARC-easy, PIQA, WinoGrande and LAMBADA by lm-eval, of models one after another; needs ``pip install '.[lm-eval]'``.

    python benchmarks/zero_shot.py smollm2 small/ --data FOLDER --limit 500 --out zero-shot.json

FOLDER holds arc_easy.jsonl, piqa.jsonl, winogrande.jsonl and lambada_openai.jsonl in the form of llm-foundry's local data. No
examples are shown (zero shot); the first so many rows of each are taken, the same for every model.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

CHOICE = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "choices"}
ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
TASKS: dict[str, dict[str, Any]] = {
    "arc_easy": {**CHOICE, "doc_to_text": "{{query}}\nAnswer:"},
    "piqa": {**CHOICE, "doc_to_text": "{{query.strip()}}\nAnswer:"},
    # The contexts are what is chosen from; the continuation is the same.
    "winogrande": {
        **CHOICE, "doc_to_text": "gold", "doc_to_target": "continuation", "doc_to_choice": "context_options",
    },
    "lambada_openai": {
        "output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": " {{continuation}}",
    },
}  # fmt: skip


def write_tasks(folder: Path, data: Path) -> None:
    """One YAML file for each task, as lm-eval reads them."""
    for name, task in TASKS.items():
        about = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data.resolve() / f"{name}.jsonl")}},
            "test_split": "test",
            "metric_list": ACCURACY,
            "metadata": {"version": 1.0},
            **task,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(about), encoding="utf-8")


def measure(model: str, tasks: Path, limit: int | None, batch: int) -> dict[str, float]:
    """The accuracy of one model on each task."""
    from twofold.evaluation.evaluate import evaluate
    from twofold.evaluation.lm_eval import TaskEvaluation

    names = [f"local_{name}" for name in TASKS]
    found = evaluate(model, tasks=names, task_folder=str(tasks), limit=limit, batch_size=batch, dtype="float32")
    assert isinstance(found, TaskEvaluation)
    return {score.task.removeprefix("local_"): score.value for score in found.models[0].tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="the first one is what the others are compared with")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="rows of each task; all of them if it is left out")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    missing = [name for name in TASKS if not (arguments.data / f"{name}.jsonl").is_file()]
    if missing:
        parser.error(
            f"{arguments.data} has no {', '.join(f'{name}.jsonl' for name in missing)}; see the top of this file"
        )
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        parser.error("lm-eval is not installed; install it with: pip install '.[lm-eval]'")
    os.environ["HF_HUB_OFFLINE"] = "1"
    record: dict[str, Any] = {"limit": arguments.limit, "threads": torch.get_num_threads(), "models": {}}
    with tempfile.TemporaryDirectory() as tasks:
        write_tasks(Path(tasks), arguments.data)
        for model in arguments.models:
            start = time.monotonic()
            accuracy = measure(model, Path(tasks), arguments.limit, arguments.batch)
            mean = sum(accuracy.values()) / len(accuracy)
            record["models"][model] = {**accuracy, "mean": mean, "seconds": time.monotonic() - start}
            first = record["models"][arguments.models[0]]["mean"]
            told = "  ".join(f"{name} {value:.4f}" for name, value in accuracy.items())
            print(f"{model}: {told}  mean {mean:.4f}, {mean / first:.4f} of the first", flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(record, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
