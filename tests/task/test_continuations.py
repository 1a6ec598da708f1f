"""Calibration texts that the model itself writes on: which windows come of it, what a run does with them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AlbertForMaskedLM

from conftest import TEXT, make_tokenizer
from twofold.calibrate.opened import Opened
from twofold.errors import TwofoldError
from twofold.model.load import LoadedModel, load_model, load_skeleton
from twofold.recipe import Recipe
from twofold.run.compress import compress
from twofold.run.estimate.estimate import estimate_run
from twofold.run.estimate.probe import probe
from twofold.task.text import windows as places
from twofold.task.text.windows import calibration_windows


def asked(checkpoint: Any, text_file: Any, **settings: Any) -> Recipe:
    given = {"keep": 0.6, "calibration": [str(text_file)], "tokens": 200, "window": 40, "continuations": 320}
    return Recipe(model=str(checkpoint), **(given | settings))


def rows(table: torch.Tensor) -> list[list[int]]:
    return [list(row) for row in table.tolist()]


def test_windows_are_followed_by_what_the_model_writes_on(checkpoint, text_file):
    loaded = load_model(str(checkpoint))
    plain = calibration_windows(loaded, asked(checkpoint, text_file, continuations=0), "mark", quiet=True)
    made = calibration_windows(loaded, asked(checkpoint, text_file), "mark", quiet=True)
    windows = made.samples
    assert windows.ids.shape == (13, 40) and made.units == made.asked == 520
    assert torch.equal(windows.ids[:5], plain.samples.ids) and torch.equal(made.held_out.ids, plain.held_out.ids)
    assert windows.sha256 != plain.samples.sha256
    assert windows.source == "texts.txt, and 320 tokens of its continuations by the model"
    # Each begins with a quarter of a window of the text, and each window takes its turn before any is taken twice.
    text = rows(plain.samples.ids)
    came = [
        {i for i, row in enumerate(text) if start in [row[j : j + 10] for j in range(31)]}
        for start in rows(windows.ids[5:, :10])
    ]
    assert all(came) and set.union(*came[:5]) == set(range(5))
    # What the model has drawn is as likely to it as its own distribution says, and not as tokens drawn at random are.
    with torch.no_grad():
        chances = torch.log_softmax(loaded.model(input_ids=windows.ids[5:]).logits[:, 9:-1], -1)
    drawn = chances.gather(-1, windows.ids[5:, 10:, None]).mean()
    likely = (chances.exp() * chances).sum(-1).mean()
    assert abs(drawn - likely) < 0.1 < likely - chances.mean() - 0.1


def test_the_same_seed_writes_the_same_and_it_is_kept(checkpoint, text_file, monkeypatch):
    loaded = load_model(str(checkpoint))
    recipe = asked(checkpoint, text_file)
    made = calibration_windows(loaded, recipe, "mark", quiet=True)
    other = calibration_windows(loaded, asked(checkpoint, text_file, seed=1), "mark", quiet=True)
    assert not torch.equal(made.samples.ids[5:], other.samples.ids[5:])
    monkeypatch.setattr("twofold.task.text.kept._before", lambda path: None)
    assert torch.equal(calibration_windows(loaded, recipe, "mark", quiet=True).samples.ids, made.samples.ids)
    monkeypatch.undo()
    monkeypatch.setenv("TWOFOLD_CACHE", str(text_file.parent / "cache"))
    monkeypatch.setattr(places, "sample_texts", lambda *a, **k: pytest.fail("sampled once more"))
    assert torch.equal(calibration_windows(loaded, recipe, "mark", quiet=True).samples.ids, made.samples.ids)
    text_file.write_text("Another text. " + TEXT, encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match="once more"):  # of another text there are none
        calibration_windows(loaded, recipe, "mark", quiet=True)


@pytest.mark.long
def test_a_run_calibrates_on_both_and_says_so(checkpoint, text_file, tmp_path):
    with_them = compress(asked(checkpoint, text_file, eval_windows=1), tmp_path / "with", quiet=True)
    without = compress(asked(checkpoint, text_file, continuations=0, eval_windows=1), tmp_path / "without", quiet=True)
    assert with_them.calibration_tokens == 520 and without.calibration_tokens == 200
    assert with_them.fingerprint != without.fingerprint
    assert json.loads((tmp_path / "with" / "run.json").read_text())["calibration"].endswith(
        "continuations by the model"
    )


def test_what_does_not_go_with_it_is_refused(checkpoint, text_file, tmp_path):
    with pytest.raises(TwofoldError, match="goes on from calibration texts, and 'self' has none"):
        compress(asked(checkpoint, text_file, calibration=["self"]), tmp_path / "out", quiet=True)
    with pytest.raises(TwofoldError, match="leave `continuations` out"):
        compress(asked(checkpoint, text_file, stream="always"), tmp_path / "out", quiet=True)
    config = AlbertConfig(
        vocab_size=264, embedding_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    silent = LoadedModel(AlbertForMaskedLM(config).eval(), make_tokenizer(), "albert", None, torch.float32)
    with pytest.raises(TwofoldError, match="can't generate"):
        calibration_windows(silent, asked(checkpoint, text_file), "mark", quiet=True)
    assert not (tmp_path / "out").exists()


def test_they_are_estimated(checkpoint, text_file, monkeypatch):
    speeds: list[Any] = []
    monkeypatch.setattr(
        "twofold.run.estimate.estimate.probe", lambda *a: speeds[0] if speeds else speeds.append(probe(*a)) or speeds[0]
    )
    skeleton = load_skeleton(str(checkpoint))
    found = [
        estimate_run(Opened(skeleton), asked(checkpoint, text_file, tokens=200_000, continuations=count), 0).seconds
        for count in (0, 200_000)
    ]
    assert found[0].get("texts", 0) < found[1]["texts"]
    assert found[1]["calibrate"] == pytest.approx(2 * found[0]["calibrate"], rel=0.01)
