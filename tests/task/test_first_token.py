"""How windows begin: as the tokenizer begins texts, on every way from a text to a window, and never twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

import twofold
from conftest import TEXT, make_model, make_tokenizer
from twofold.calibrate.opened import Opened
from twofold.comparison.grid import make_grid
from twofold.comparison.shared import set_up
from twofold.errors import TwofoldError
from twofold.model.load import LoadedModel
from twofold.recipe import Recipe
from twofold.task.text.held_out import evaluation_windows
from twofold.task.text.special import begun, cut_windows, text_prefix
from twofold.task.text.texts import token_windows
from twofold.task.text.windows import calibration_windows
from twofold.tuning.rows import Row
from twofold.tuning.tokens import encode

BOS, EOS = 256, 257
TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"


def beginning(single: str = "<bos> $A", template: str | None = None) -> Any:
    """A tokenizer that puts special tokens around each text."""
    tokenizer = make_tokenizer()
    ids = [("<bos>", BOS), ("<eos>", EOS), ("<pad>", 258)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def begins(tmp_path: Path) -> Path:
    """A tiny Llama whose tokenizer begins each text with <bos>."""
    folder = tmp_path / "begins"
    make_model().save_pretrained(folder)
    beginning().save_pretrained(folder)
    return folder


@given(
    ids=st.lists(st.integers(0, 5), max_size=80),
    prefix=st.lists(st.integers(6, 8), max_size=3),
    room=st.integers(1, 9),
)
def test_every_window_is_the_prefix_and_the_text_in_order(ids: list[int], prefix: list[int], room: int) -> None:
    windows = cut_windows(ids, len(prefix) + room, prefix).tolist()
    assert all(row[: len(prefix)] == prefix for row in windows)
    assert [token for row in windows for token in row[len(prefix) :]] == ids[: len(ids) // room * room]


@given(
    ids=st.lists(st.integers(0, 2), max_size=80), prefix=st.lists(st.integers(0, 2), max_size=2), room=st.integers(1, 9)
)
def test_a_prefix_that_stands_in_the_text_begins_no_window_twice(ids: list[int], prefix: list[int], room: int) -> None:
    size = len(prefix)
    rest, read = list(ids), []
    for row in cut_windows(ids, size + room, prefix).tolist():
        assert row[:size] == prefix and (not prefix or row[size : 2 * size] != prefix)
        while prefix and rest[:size] == prefix:
            rest = rest[size:]
        read, rest = row[size:], rest
        assert rest[:room] == read
        rest = rest[room:]
    assert begun(ids, prefix) == begun(begun(ids, prefix), prefix)


@pytest.mark.parametrize(
    ("single", "prefix"),
    [
        ("$A", []),
        ("<bos> $A", [BOS]),
        ("<bos> $A <eos>", [BOS]),  # as BERT's [CLS] and [SEP]: a window is the beginning of a text, and seldom its end
        ("$A <eos>", []),
        ("<bos> <pad> $A", [BOS, 258]),
    ],
)
def test_the_prefix_is_what_the_tokenizer_itself_puts_before_a_text(single: str, prefix: list[int]) -> None:
    tokenizer = beginning(single)
    assert text_prefix(tokenizer) == prefix
    windows = token_windows([TEXT], tokenizer, tokens=512, window=32, held_out=2)
    for table in (windows.samples.ids, windows.held_out.ids):
        assert table.shape[1] == 32 and (table[:, : len(prefix)] == torch.tensor(prefix)).all()
    assert windows.samples.begin == "".join({BOS: "<bos>", 258: "<pad>"}[token] for token in prefix)


def test_without_a_prefix_and_by_bos_none_windows_are_the_text_alone(text_file: Path) -> None:
    plain = token_windows([TEXT], make_tokenizer(), tokens=512, window=32, held_out=2)
    none = token_windows([TEXT], beginning(), tokens=512, window=32, held_out=2, bos="none")
    ids = torch.tensor(make_tokenizer()(TEXT, add_special_tokens=False)["input_ids"])
    assert torch.equal(plain.samples.ids, ids[:512].view(16, 32)) and torch.equal(plain.samples.ids, none.samples.ids)
    assert torch.equal(plain.held_out.ids, none.held_out.ids) and none.samples.begin == ""
    measured = evaluation_windows(text_file, beginning(), window=32, windows=4, bos="none")
    assert torch.equal(measured.ids, ids[:128].view(4, 32))


@pytest.mark.parametrize("template", [None, TEMPLATE, "<bos>" + TEMPLATE])
@pytest.mark.parametrize(
    "settings", [{}, {"calibration": ["self"]}, {"continuations": 96}], ids=["text", "self", "more"]
)
@pytest.mark.parametrize("bos", ["auto", "none"])
def test_all_windows_of_a_run_begin_alike(template: str | None, settings: Any, bos: str, text_file: Path) -> None:
    loaded = LoadedModel(make_model(), beginning(template=template), "tiny", None, torch.float32)
    recipe = Recipe(
        **{"model": "tiny", "keep": 0.6, "calibration": [str(text_file)], "tokens": 96, "window": 24, **settings}
    )
    recipe = recipe.model_copy(update={"bos": bos, "eval_text": str(text_file)})
    data = calibration_windows(loaded, recipe, "mark", held_out=4, quiet=True)
    measured = Opened(loaded).need_task().measured(loaded, recipe)
    assert data.samples.ids.shape[1] == data.held_out.ids.shape[1] == 24 and measured is not None
    for samples in (data.samples, data.held_out, measured):
        assert len(samples) and samples.begin == ("<bos>" if bos == "auto" else "")
        if bos == "auto":
            assert (samples.ids[:, 0] == BOS).all() and (samples.ids[:, 1] != BOS).all()
        elif not settings.get("calibration"):  # what the model writes itself may be <bos>
            assert (samples.ids[:4, 0] != BOS).all()


def test_a_conversation_that_its_template_begins_has_one_beginning(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    said = [("user", "How old is the castle of Arles?"), ("assistant", "It is very old.")]
    turns = {"messages": [{"role": role, "content": content} for role, content in said]}
    rows.write_text((json.dumps(turns) + "\n") * 20)
    loaded = LoadedModel(make_model(), beginning(template="<bos>" + TEMPLATE), "tiny", None, torch.float32)
    recipe = Recipe(model="tiny", keep=0.6, calibration=[str(rows)], tokens=96, window=24)
    ids = calibration_windows(loaded, recipe, "mark", quiet=True).samples.ids
    assert (ids[:, 0] == BOS).all() and (ids[:, 1] != BOS).all()
    tokenizer = loaded.tokenizer
    for row in (
        Row("1", prompt="How old?", completion=" old"),
        Row("1", prompt="<bos>How old?", completion=" old"),  # rendered before by a template
        Row("1", completion="<bos>How old? old"),
    ):
        learnt = encode(row, tokenizer)
        assert tokenizer.decode(learnt.input_ids) == "<bos>How old? old<eos>"
        answer = [label for label in learnt.labels if label >= 0]
        assert tokenizer.decode(answer) == (" old<eos>" if row.prompt else "<bos>How old? old<eos>")


def test_a_window_without_room_for_text_is_refused() -> None:
    with pytest.raises(TwofoldError, match="use at least `window=3`, or windows without them by `bos=none`"):
        token_windows([TEXT], beginning("<bos> <pad> $A"), tokens=64, window=2)


@pytest.mark.long
@pytest.mark.parametrize("stream", ["never", "always"])
def test_a_run_records_how_its_windows_begin(stream: str, begins: Path, text_file: Path, tmp_path: Path) -> None:
    given: Any = {"calibration": str(text_file), "keep": 0.6, "tokens": 96, "window": 24, "eval_windows": 1}
    out = tmp_path / "out"
    run = twofold.compress(str(begins), out, stream=stream, quiet=True, **given)
    assert run.windows_begin == "<bos>" and json.loads((out / "run.json").read_text())["windows_begin"] == "<bos>"
    assert "each window begins with `<bos>`" in (out / "README.md").read_text()
    measured = twofold.evaluate(str(out), str(text_file), against=str(begins), window=24, windows=2, quiet=True)
    without = twofold.evaluate(str(out), str(text_file), window=24, windows=2, bos="none", quiet=True)
    assert (measured.begin, without.begin) == ("<bos>", "")
    assert measured.predicted_tokens == without.predicted_tokens == 2 * 23
    assert measured.models[1].perplexity != without.models[0].perplexity


def test_a_comparison_measures_on_windows_that_begin_alike(begins: Path, text_file: Path) -> None:
    settings: Any = {"model": str(begins), "calibration": [str(text_file)], "tokens": 96, "window": 24, "keep": [0.6],
                     "other_text": [str(text_file)], "eval_windows": 1}  # fmt: skip
    for bos, begin in (("auto", "<bos>"), ("none", "")):
        setup = set_up(make_grid(settings | {"bos": bos}), quiet=True)
        assert [text.begin for text, _ in setup.texts] == [begin] * 2
        assert all(int(samples.ids[0, 0] == BOS) == bool(begin) for _, samples in setup.texts)
