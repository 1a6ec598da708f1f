"""The demo's texts: in the package, of many kinds, and taken only where they are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from twofold.model.builtin import smollm2_folder
from twofold.model.load import load_model
from twofold.recipe import Recipe
from twofold.task.text.demo import DEMO_FILE
from twofold.task.text.row import Tally
from twofold.task.text.texts import read_texts
from twofold.task.text.windows import DEMO_WORDS, calibration_windows

TOKENS, HELD_OUT = 8192, 4 * 512  # of make demo


def test_every_row_is_read_and_none_stands_twice() -> None:
    rows = [json.loads(line) for line in DEMO_FILE.read_text(encoding="utf-8").splitlines()]
    tally = Tally()
    texts = list(read_texts(["demo"], tally=tally))
    assert len(set(texts)) == len(texts) == len(rows)
    assert not tally.skipped and not tally.unread
    assert {frozenset(row) for row in rows} == {frozenset({"text"}), frozenset({"messages"})}
    assert (
        4 * (TOKENS + HELD_OUT) > sum(map(len, texts)) > 3.5 * (TOKENS + HELD_OUT)
    )  # characters; a token is about four


def test_they_are_taken_where_they_are_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Recipe(model="m", keep=0.5).calibration == ["self"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a file or folder of the name is ./demo
    asked = Recipe(model=str(checkpoint), keep=0.5, calibration=["demo"], tokens=640, window=32)
    data = calibration_windows(load_model(str(checkpoint)), asked, "mark", held_out=4)
    assert data.samples.shape == [20, 32] and data.held_out.shape == [4, 32]
    assert data.samples.source == DEMO_WORDS
    assert DEMO_WORDS in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.slow
def test_they_are_enough_for_the_demo() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    assert (
        sum(len(tokenizer(text)["input_ids"]) for text in read_texts(["demo"], tokenizer=tokenizer))
        >= TOKENS + HELD_OUT
    )
