"""Odd checkpoints × commands: the right result or one sentence, the same in memory and block by block."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import twofold.cli
from conftest import TEXT
from odd import ODD, adapter, load, logits_of, save
from runs import as_one
from twofold.checkpoint.headers import read_headers, weight_files
from twofold.planning.plan import Plan

QUICK = ["--tokens", "64", "--window", "16", "--eval-windows", "1", "--quiet"]
KEEP = ["--keep", "0.7"]


@pytest.fixture
def run(capsys: Any, monkeypatch: Any) -> Any:
    """Run the command in this process, and return what it says; it ends well or with one sentence."""
    monkeypatch.setattr("twofold.report.page.write_report", lambda *arguments: None)  # seconds, of no interest here
    monkeypatch.setattr("twofold.tuning.run.draw_curve", lambda _, path: path.touch())

    def call(*arguments: Any) -> str | None:
        monkeypatch.setattr(sys, "argv", ["twofold", *map(str, arguments)])
        code = 0
        try:
            twofold.cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        said = capsys.readouterr()
        assert code in (0, 2), said.err
        if code == 0:
            return None
        assert said.err.startswith("twofold: "), said.err
        assert said.err.count("\n") == 1, said.err
        return str(said.err)

    return call


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Files of text, and of rows."""
    (tmp_path / "text.txt").write_text(TEXT)
    rows = "".join(json.dumps({"prompt": f"How old is {i}?", "completion": f"{i} years."}) + "\n" for i in range(12))
    (tmp_path / "rows.jsonl").write_text(rows)
    return {"text": tmp_path / "text.txt", "rows": tmp_path / "rows.jsonl"}


@pytest.fixture(scope="module")
def good_adapter(tmp_path_factory: Any) -> Path:
    """An adapter of the good checkpoint."""
    place = tmp_path_factory.mktemp("good")
    return adapter(place / "adapter", save(place / "model"))


def close(one: torch.Tensor, other: torch.Tensor, *, half: bool) -> None:
    """Check that logits are equal within the rounding of the dtype that is written."""
    scale = float(other.abs().max())
    torch.testing.assert_close(one, other, rtol=0, atol=scale * (0.06 if half else 2e-3))


def accounted(source: Path, plan: Plan, unused: int, buffers: int) -> None:
    """Check that each tensor of the source is a weight of the plan, a buffer, or listed as not used."""
    stored = read_headers(weight_files(source, "it"))
    assert len(plan.unused) == unused
    assert {entry.name for entry in plan.unused} <= set(stored)
    numbers = sum(header.numbers for name, header in stored.items() if name not in {e.name for e in plan.unused})
    assert numbers == plan.model_before + buffers


@pytest.mark.long
# Every fourth one in make test, all in make check-slow: a folder goes through eight commands.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i % 4 else ()) for i, name in enumerate(sorted(ODD))]
)
def test_an_odd_folder_gives_the_right_result_or_one_sentence(
    name, run, texts, good_adapter, tmp_path, monkeypatch, modules_cache
):
    odd, source = ODD[name], tmp_path / "model"
    odd.make(source)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    calibration = ["--calibration", texts["text"], *QUICK]
    memory, dense, tuned, merged = (tmp_path / name for name in ("memory", "dense", "tuned", "merged"))
    measure = ["--text", texts["text"], "--window", "16", "--windows", "1"]
    learn = ["--data", texts["rows"], "--steps", "1", "--length", "32", "--learning-rate", "1e-12", "--quiet"]
    commands = {
        "inspect": ["inspect", source],
        "plan": ["plan", source, *KEEP, *calibration, "--out", tmp_path / "plan.json"],
        "memory": ["compress", source, *KEEP, *calibration, "--out", memory],
        "streamed": ["compress", source, *KEEP, *calibration, "--stream", "always", "--out", tmp_path / "streamed"],
        "eval": ["eval", memory if odd.refused is None else source, "--against", source, *measure],
        "dense": ["export", memory if odd.refused is None else source, "--to", "dense", "--out", dense, "--quiet"],
        "tune": ["tune", source, *learn, "--out", tuned],
        "merge": ["merge", source, tmp_path / "adapter", "--out", merged],
    }
    commands = {what: [*command, *odd.flags] for what, command in commands.items()}
    if odd.refused is not None:
        (tmp_path / "adapter").symlink_to(good_adapter)
        said = {what: run(*command) for what, command in commands.items()}
        for what, sentence in said.items():
            if what != "inspect" or sentence is not None:  # which reads no weights
                assert odd.refused in str(sentence), what
        assert said["memory"] == said["streamed"]
        assert not any(path.exists() for path in (memory, dense, tuned, merged))
        assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
        return
    for what in ("inspect", "plan", "memory"):
        assert run(*commands[what]) is None, what
    original = load(source, odd.loads)
    buffers = set(original.state_dict()) & {buffer for buffer, _ in original.named_buffers()}
    size = sum(original.get_buffer(buffer).numel() for buffer in buffers)
    accounted(source, Plan.load(memory / "plan.json"), odd.unused, size)
    meant = logits_of(original)
    close(logits_of(memory, odd.loads), meant, half=odd.half)

    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache-streamed"))
    assert run(*commands["streamed"]) is None
    as_one(memory, tmp_path / "streamed")

    for what in ("eval", "dense"):
        assert run(*commands[what]) is None, what
    close(logits_of(dense, odd.loads), meant, half=odd.half)
    if odd.loads is not AutoModelForCausalLM:
        assert "does not write text" in str(run(*commands["tune"]))
        return
    adapter(tmp_path / "adapter", source, odd.adapts)
    for what in ("tune", "merge"):
        assert run(*commands[what]) is None, what
    close(logits_of(PeftModel.from_pretrained(load(source), tuned)), meant, half=odd.half)
    close(logits_of(merged), logits_of(PeftModel.from_pretrained(load(source), tmp_path / "adapter")), half=odd.half)
