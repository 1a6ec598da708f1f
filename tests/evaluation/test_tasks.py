"""Accuracy on tasks by lm-eval, on files of one's own: against log-likelihoods by hand, with an adapter, and faults."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import processors

import twofold.cli
from conftest import make_model, make_tokenizer
from factored import with_lora
from twofold.errors import TwofoldError
from twofold.evaluation.evaluate import evaluate

ROWS = [
    {"query": f"The number {i} is", "choices": [" odd", " even", " neither"], "gold": i % 3}
    for i in range(12)
]  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command in this process: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["twofold", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            twofold.cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of three choices, on a file."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    about = {
        "task": "parity",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / "parity.yaml").write_text(yaml.safe_dump(about))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def accuracy(model: Any, rows: list[dict[str, Any]]) -> float:
    """The share of rows whose right answer has the largest log-likelihood."""
    tokenizer, right = make_tokenizer(), 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(row["query"] + choice, return_tensors="pt").input_ids
            start = len(tokenizer(row["query"]).input_ids)
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores.append(float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        right += scores.index(max(scores)) == row["gold"]
    return right / len(rows)


@pytest.mark.long
@pytest.mark.parametrize("limit", [None, 7])
def test_accuracy_is_that_of_log_likelihoods_by_hand(limit: int | None, tasks: Path, model: Path) -> None:
    found = evaluate(str(model), tasks=["parity"], task_folder=str(tasks), limit=limit, quiet=True)
    (score,) = found.models[0].tasks
    assert score.rows == (limit or 12) and score.metric == "acc" and score.standard_error is not None
    assert score.value == pytest.approx(accuracy(make_model(), ROWS[:limit]))
    assert found.models[0].mean == score.value


@pytest.mark.long
def test_rows_begin_as_the_tokenizer_begins_texts(tasks: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    given = {"single": "<bos> $A", "special_tokens": [("<bos>", 256)]}
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(**given)
    tokenizer.pad_token = tokenizer.eos_token = None  # nothing that lm-eval could pad with
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    firsts: set[int] = set()

    def see(module: torch.nn.Module, given: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            firsts.update(given[0][:, 0].tolist())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        for bos, begin in (("auto", "<bos>"), ("none", "T")):
            firsts.clear()
            evaluate(str(tmp_path), tasks=["parity"], task_folder=str(tasks), limit=3, bos=bos, quiet=True)  # type: ignore[arg-type]
            assert firsts == {tokenizer.convert_tokens_to_ids(begin)}
    finally:
        hook.remove()


@pytest.mark.long
def test_the_original_and_a_model_with_an_adapter_side_by_side(
    tasks: Path, model: Path, tmp_path: Path, run: Any
) -> None:
    adapted = with_lora(make_model(), rank=4)
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = ["eval", model, "--against", model, "--adapter", tmp_path / "adapter", "--tasks", "parity"]
    arguments += ["--task-folder", tasks, "--quiet"]
    code, out, _ = run(*arguments, "--json")
    models = json.loads(out)["models"]
    assert code == 0 and [m["name"] for m in models] == [str(model), f"{model} with {tmp_path / 'adapter'}"]
    assert models[0]["mean"] == pytest.approx(accuracy(make_model(), ROWS))
    assert models[1]["mean"] == pytest.approx(accuracy(adapted, ROWS))
    code, out, _ = run(*arguments)
    assert code == 0 and "parity" in out and "of the original" in out


def test_an_adapter_is_measured_on_a_text_too(model: Path, tmp_path: Path, text_file: Path, run: Any) -> None:
    with_lora(make_model(), rank=4).save_pretrained(tmp_path / "adapter")
    arguments = ["eval", model, "--against", model, "--text", text_file, "--window", 64, "--json", "--quiet"]
    code, out, _ = run(*arguments, "--adapter", tmp_path / "adapter")
    assert code == 0 and json.loads(out)["models"][1]["divergence"] > 1e-6


@pytest.mark.long
def test_faults_are_told_in_a_sentence(tasks: Path, model: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    for given, words in (
        ([], "give either --text FILE to measure perplexity, --tasks NAMES"),
        (["--tasks", "parity", "--text", "a.txt"], "give either --text FILE to measure perplexity, --tasks NAMES"),
        (["--tasks", " , "], "names no task"),
        (["--tasks", "parity", "--window", 64], "--window goes with --text and not with --tasks"),
        (["--text", "a.txt", "--limit", 5], "--limit goes with --tasks and not with --text"),
        (["--tasks", "no_such_task", "--task-folder", tasks], "lm-eval has no task no_such_task"),
        (["--tasks", "parity", "--task-folder", tasks / "absent"], "there is no folder"),
        (["--tasks", "parity", "--task-folder", tasks, "--adapter", tasks], "there is no adapter in"),
    ):
        code, _, error = run("eval", model, *given, "--quiet")
        assert code == 2 and words in error
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(
        TwofoldError, match=r"needs lm-eval, which is not installed; install it with: pip install 'twofold\[lm-eval\]'"
    ):
        evaluate(str(model), tasks=["parity"], quiet=True)


@pytest.mark.long
def test_a_group_counts_as_one_task_and_a_perplexity_has_no_mean(tasks: Path, model: Path, tmp_path: Path) -> None:
    about = yaml.safe_load((tasks / "parity.yaml").read_text())
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(about | {"task": "again", "doc_to_target": 0}))
    (tmp_path / "parity.yaml").write_text(yaml.safe_dump(about))
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["parity", "again"]}))
    words = {"task": "words", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{query}}"}
    words["metric_list"] = [{"metric": "word_perplexity"}]
    kept = {key: about[key] for key in ("dataset_path", "dataset_kwargs", "test_split", "metadata")}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(kept | words))
    found = evaluate(str(model), tasks=["both"], task_folder=str(tmp_path), quiet=True).models[0]
    (group,) = found.tasks
    each = [accuracy(make_model(), rows) for rows in (ROWS, [row | {"gold": 0} for row in ROWS])]
    assert group.rows == 24 and group.value == found.mean == pytest.approx(sum(each) / 2)
    mixed = evaluate(str(model), tasks=["words", "parity"], task_folder=str(tmp_path), quiet=True).models[0]
    assert mixed.mean is None and not mixed.tasks[0].higher_is_better and mixed.tasks[0].value > 1


def test_data_that_can_not_be_fetched_is_told(tasks: Path, model: Path, tmp_path: Path) -> None:
    about = yaml.safe_load((tasks / "parity.yaml").read_text()) | {"task": "absent"}
    about["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "absent.jsonl")}}
    (tmp_path / "absent.yaml").write_text(yaml.safe_dump(about))
    with pytest.raises(TwofoldError, match=r"could not measure .* on absent .*with `task_folder`"):
        evaluate(str(model), tasks=["absent"], task_folder=str(tmp_path), quiet=True)
