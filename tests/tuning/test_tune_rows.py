"""Rows that are learnt from: what is read, which tokens are learnt, and what is said of bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import make_tokenizer
from twofold.errors import TwofoldError
from twofold.task.text.row import Row, Tally, Turn
from twofold.tuning.rows import read_rows
from twofold.tuning.settings import make_settings
from twofold.tuning.tokens import IGNORED, Example, encode, encode_rows

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def write(path: Path, rows: list[Any]) -> str:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return str(path)


def learnt(example: Example) -> str:
    text: str = make_tokenizer().decode([label for label in example.labels if label != IGNORED])
    return text


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
         {"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "No"}]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "2 + 2 = ", "completion": "4"}, "2 + 2 = ", "4<eos>"),
        ({"prompt": "2 + 2 = ", "response": "4"}, "2 + 2 = ", "4<eos>"),
        ({"instruction": "Add", "input": "2, 2", "output": "4"}, "Add\n\n2, 2\n\n", "4<eos>"),
        ({"instruction": "Say hi", "output": "hi"}, "Say hi\n\n", "hi<eos>"),
        ({"text": "A text."}, "", "A text.<eos>"),
        ({"messages": TURNS}, "<user>Hi</><assistant>", "Ho</>No</>"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            "<user>Hi</><assistant>",
            "Ho</>",
        ),
        ({"prompt": TURNS[:1], "completion": TURNS[1:2]}, "<user>Hi</><assistant>", "Ho</>"),
    ],
)
def test_the_answers_alone_are_learnt(row: dict[str, Any], prompt: str, answer: str, tmp_path: Path) -> None:
    rows = read_rows([write(tmp_path / "rows.jsonl", [row])]).rows
    example = encode(rows[0], chat_tokenizer())
    text = make_tokenizer().decode(example.input_ids)
    assert text.startswith(prompt)
    assert learnt(example) == answer
    assert len(example.labels) == len(example.input_ids)
    everything = encode(rows[0], chat_tokenizer(), loss="all")
    assert everything.labels == everything.input_ids == example.input_ids


def test_prompt_and_completion_become_turns_if_asked() -> None:
    row = Row("a row", prompt="Hi\n", completion="Ho")
    example = encode(row.chat, chat_tokenizer())
    assert make_tokenizer().decode(example.input_ids) == "<user>Hi</><assistant>Ho</>"
    assert learnt(example) == "Ho</>"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x"}, 'no "completion"'),
        ({"prompt": "x", "completion": ""}, "'completion' is empty"),
        ({"prompt": "x", "completion": 3}, "'completion' must be a text, it is a number"),
        ({"riddle": "x"}, 'needs "messages", "prompt" with "completion", or "text" (or the fields of another format'),
        ({"messages": []}, "'messages' must be a list of turns, it is empty"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no turn of the assistant"),
        ({"messages": [{"content": "x"}]}, "turn 1 of 'messages' has no \"role\""),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
            "turn 2 of 'messages'",
        ),
        ({"messages": ["x"]}, "must be an object, it is a text"),
        ([1, 2], "must be a JSON object, this is a list"),
        ('{"prompt": "x", "compl', "it is not JSON"),
        ('{"text": "\\ud800"}', "half of a character"),
    ],
)
def test_a_bad_row_is_named_by_its_line_and_what_it_lacks(row: Any, said: str, tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    path = write(tmp_path / "rows.jsonl", [good, "", row, good, row])
    with pytest.raises(TwofoldError) as error:
        read_rows([path])
    assert f"{path}, line 3: " in str(error.value) and said in str(error.value) and "`skip_bad`" in str(error.value)
    rows = read_rows([path], skip_bad=True)
    assert (len(rows.rows), rows.skipped) == (2, 2)
    assert rows.first_skipped.startswith(f"{path}, line 3: ")


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    for name, content in (("empty.jsonl", ""), ("blank.jsonl", "\n \n"), ("list.json", "[]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(TwofoldError, match="there are no rows in"):
            read_rows([str(tmp_path / name)])
    bad = write(tmp_path / "bad.jsonl", [{"x": 1}])
    with pytest.raises(TwofoldError, match=r"no rows in .* but 1 bad ones, first .*line 1"):
        read_rows([bad], skip_bad=True)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    for source, said in (
        (str(tmp_path / "none.jsonl"), "there is no file"),
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "*.csv"), "no file matches"),
        (str(tmp_path / "latin.jsonl"), "not a text file in UTF-8"),
    ):
        with pytest.raises(TwofoldError, match=said):
            read_rows([source])


def test_long_rows_are_refused_cut_or_skipped() -> None:
    rows = [Row(f"line {i}", prompt="p" * 10, completion="c" * size) for i, size in enumerate((5, 30, 50))]
    rows.append(Row("line 3", prompt="p" * 40, completion="c"))
    tokenizer = make_tokenizer()
    with pytest.raises(
        TwofoldError, match=r"line 1 has 41 tokens, more than the 20 of `length`, and so have 2 more .*longest 61"
    ):
        encode_rows(rows, tokenizer, length=20, held_out=0)
    cut = encode_rows(rows, tokenizer, length=20, long="cut", held_out=0)
    assert (len(cut.train), cut.cut, cut.left_out) == (3, 2, 1)  # of a prompt that fills it nothing is learnt
    assert max(len(one.input_ids) for one in cut.train) == 20
    skipped = encode_rows(rows, tokenizer, length=20, long="skip", held_out=0)
    assert (len(skipped.train), skipped.cut, skipped.left_out) == (1, 0, 3)


def test_rows_that_the_template_refuses_are_named_or_skipped() -> None:
    good = [Row(f"line {i}", turns=(Turn("user", "Hi"), Turn("assistant", "Ho"))) for i in range(2)]
    odd = Row("line 7", turns=(Turn("odd", "Hi"), Turn("assistant", "Ho")))
    first = Row("line 8", turns=(Turn("assistant", "Ho"), Turn("user", "Hi")))  # what comes before its answer is empty
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'odd' %}{{ raise_exception('') }}{% endif %}" + CHAT
    tokenizer.chat_template = "{{ messages[0]['role'][:0] }}" + tokenizer.chat_template
    for bad in (odd, first):
        with pytest.raises(TwofoldError, match=rf"{bad.where}: the chat template refuses it .*`skip_bad`"):
            encode_rows([*good, bad], tokenizer, length=64, held_out=0)
    tally = Tally()
    found = encode_rows([*good, odd, first], tokenizer, length=64, held_out=0, skip_bad=True, tally=tally)
    assert (len(found.train), tally.skipped) == (2, 2)
    assert tally.first_skipped.startswith("line 7: the chat template refuses it")
    with pytest.raises(TwofoldError, match="no row is left to learn from: 1 bad ones were skipped, first line 7"):
        encode_rows([odd], tokenizer, length=64, skip_bad=True)


def test_rows_are_held_out_by_the_seed() -> None:
    rows = [Row(f"line {i}", prompt="p", completion=f"answer {i}") for i in range(20)]
    tokenizer = make_tokenizer()
    first, again, other = (encode_rows(rows, tokenizer, length=64, held_out=0.25, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.held_out != other.held_out
    assert (len(first.train), len(first.held_out)) == (15, 5)
    both = [tuple(one.input_ids) for one in (*first.train, *first.held_out)]
    assert len(set(both)) == 20
    assert len(encode_rows(rows, tokenizer, length=64, held_out=3).held_out) == 3
    with pytest.raises(TwofoldError, match="none is left to train on"):
        encode_rows(rows, tokenizer, length=64, held_out=20)


def test_a_conversation_needs_a_template_that_goes_on() -> None:
    row = Row("line 7", turns=(Turn("user", "Hi"), Turn("assistant", "Ho")))
    with pytest.raises(TwofoldError, match="line 7 is a conversation, and the tokenizer has no chat template"):
        encode(row, make_tokenizer())
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHAT  # its beginning changes with each turn
    with pytest.raises(TwofoldError, match="renders the beginning of a conversation otherwise"):
        encode(row, tokenizer)
    assert encode(row, tokenizer, loss="all").learnt > 0
    tokenizer.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(TwofoldError, match=r"line 7: the chat template refuses it .*only users"):
        encode(row, tokenizer)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch": 4, "micro_batch": 3}, "`micro_batch` must divide `batch`"),
        ({"held_out": 2.5}, "`held_out` must be a share below 1 or a whole number"),
        ({"method": "best"}, "`method`:.*got 'best'"),
        ({"learning_rate": float("nan")}, "`learning_rate`"),
        ({"rank": 0}, "`rank`"),
        ({"patience": 2, "steps": 40, "evaluate_every": 4, "save_every": 6}, "`save_every` that is a multiple"),
        ({"patience": 2, "steps": 40, "held_out": 0}, "`patience` needs held-out rows"),
        ({"patience": 2, "steps": 40, "method": "adalora"}, "`method=adalora` keeps none"),
        ({"ranks": 1}, "no setting 'ranks'"),
    ],
)
def test_settings_that_do_not_fit(given: dict[str, object], said: str) -> None:
    with pytest.raises(TwofoldError, match=said):
        make_settings({"model": "m", "data": ["d"], **given})
