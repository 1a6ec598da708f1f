"""One reader of rows: all commands see the same ones, whatever their format and wherever they stand."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import make_tokenizer
from twofold.errors import TwofoldError
from twofold.model.load import load_model
from twofold.recipe import Recipe
from twofold.task.text.formats import FORMATS
from twofold.task.text.held_out import evaluation_windows
from twofold.task.text.row import Tally
from twofold.task.text.texts import read_texts
from twofold.task.text.windows import calibration_windows
from twofold.tuning.rows import read_rows
from twofold.tuning.tokens import IGNORED, encode, encode_rows

TURN = "<{{ m.role }}>{{ m.content | trim }}"
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</>{% endif %}"
ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
FULL = TOOLS + "{% for m in messages %}" + TURN + CALLS + "</>{% endfor %}" + ASK
BARE = "{% for m in messages %}" + TURN + "</>{% endfor %}" + ASK  # knows neither tools nor calls
ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}

CALLED = '[area {"side": 7}]</>It is 7.</>'
EXAMPLES = [example for known in FORMATS for example in known.examples]
LEARNT = [  # of each example
    "It is 7.</>", "It is 7.</>", "It is 7.</>", CALLED,
    "It is 7.</>", "It is 7.</>",
    "It is 7.</>", "It is 7.</>", CALLED, "It is 7.</>",
    "4<eos>", "4<eos>", "Yes?</>4</>",
    "4<eos>", "It is 7.</>", "4<eos>", "4<eos>",
    "4<eos>", "4</>",
    "4<eos>",
    "It is 7.</>",
    "A text.<eos>",
    "A text.<eos>",
]  # fmt: skip


def tokenizer_with(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def lines(rows: list[Any]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def table(path: Path, rows: list[Any]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        cells = [
            {key: held if isinstance(held, str) else json.dumps(held) for key, held in row.items()} for row in rows
        ]
        writer.writerows(cells)


def written(text: Callable[[list[Any]], str], encoding: str = "utf-8") -> Callable[[Path, list[Any]], object]:
    return lambda path, rows: path.write_bytes(text(rows).encode(encoding))


WAYS: dict[str, Callable[[Path, list[Any]], object]] = {
    "lines.jsonl": written(lines),
    "lines.json": written(lines),
    "lines.ndjson": written(lines),
    "lines.txt": written(lines),
    "mark.jsonl": written(lines, "utf-8-sig"),
    "windows.jsonl": written(lambda rows: lines(rows).replace("\n", "\r\n")),
    "gaps.jsonl": written(lambda rows: lines(rows).replace("\n", "\n\n \n")),
    "list.json": written(json.dumps),
    "list.jsonl": written(json.dumps),
    "pretty.json": written(lambda rows: json.dumps(rows, indent=2), "utf-8-sig"),
    "data.json": written(lambda rows: json.dumps({"data": rows}, indent=1)),
    "split.json": written(lambda rows: json.dumps({"train": rows})),
    "packed.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows).encode())),
    "packed.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "table.parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
}
TABLES = {"table.csv": table, "table.tsv": table}  # cells are texts, turns are JSON in them


def ways(example: dict[str, Any]) -> dict[str, Callable[[Path, list[Any]], object]]:
    """Return the ways to write a row that can hold it."""
    held = WAYS if "conversation" in example else WAYS | TABLES
    mixed = '"type": "text"' in json.dumps(example)  # a column of Parquet has one type
    return {name: write for name, write in held.items() if not (mixed and name.endswith(".parquet"))}


def tuned(path: Path, tokenizer: Any, **how: Any) -> list[str]:
    """Return the rows as fine-tuning sees them, all tokens."""
    examples = [encode(row, tokenizer, loss="all") for row in read_rows([str(path)], **how).rows]
    return [tokenizer.decode(example.input_ids).removesuffix("<eos>") for example in examples]


def learnt(row: Any, tokenizer: Any) -> str:
    example = encode(row, tokenizer)
    words: str = tokenizer.decode([label for label in example.labels if label != IGNORED])
    return words


@pytest.mark.parametrize(
    ("example", "answer"), zip(EXAMPLES, LEARNT, strict=True), ids=[str(list(e)) for e in EXAMPLES]
)
def test_each_format_is_the_same_row_for_all_commands_in_every_kind_of_file(example, answer, tmp_path):
    tokenizer = tokenizer_with(FULL)
    first, text = None, None
    for name, write in ways(example).items():
        path = tmp_path / name
        write(path, [example] * 3)
        rows = [replace(row, where="") for row in read_rows([str(path)]).rows]
        texts = list(read_texts(str(path), tokenizer=tokenizer))
        first, text = first or rows[0], text or texts[0]
        assert rows == [first] * 3, name
        assert texts == [text] * 3 == tuned(path, tokenizer), name
        assert "None" not in text and "{'" not in text
    assert learnt(first, tokenizer) == answer
    assert first.unread == (("rejected",) if "rejected" in example else ())


def test_the_table_of_the_docs_has_every_format():
    docs = (Path(__file__).parents[2] / "docs" / "tune.md").read_text(encoding="utf-8")
    for known in FORMATS:
        for example in known.examples:
            assert f"| {known.name} | `{json.dumps(example, ensure_ascii=False)}` | {known.learnt} |" in docs


def test_data_sets_in_folders(tmp_path):
    rows = [{"messages": [ASKED, SAID]}] * 3
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "kept")
    (tmp_path / "hub").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hub" / "train.parquet")
    tokenizer = tokenizer_with(FULL)
    for name in ("kept", "hub"):
        for limit in (None, 1000):
            texts = list(read_texts(tmp_path / name, tokenizer=tokenizer, characters=limit))
            assert texts == ["<user>Hi</><assistant>Ho</>"] * 3 == tuned(tmp_path / name, tokenizer)


def test_a_text_is_one_row(tmp_path):
    for name in ("a.txt", "b.md", "c"):
        (tmp_path / name).write_text("One line.\n{not a row}\n")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"One line.\n{not a row}\n"))
    tokenizer = tokenizer_with(FULL)
    assert list(read_texts(tmp_path / "*", tokenizer=tokenizer)) == ["One line.\n{not a row}\n"] * 4
    assert tuned(tmp_path / "*", tokenizer) == ["One line.\n{not a row}\n"] * 4


@pytest.mark.parametrize("name", [*WAYS, "text", "table.csv"])
def test_a_pipe_gives_what_a_file_gives_to_the_last_byte(name, tmp_path):
    for kept in ("file", "pipe"):
        (tmp_path / kept).mkdir()
    rows = [{"prompt": f"{i} + 2 = ", "completion": str(i + 2)} for i in range(3)]
    write = {**WAYS, **TABLES, "text": lambda path, _: path.write_text("A text.\nOf lines.\n")}[name]
    write(tmp_path / "file" / name, rows)
    reading, writing = os.pipe()
    os.write(writing, (tmp_path / "file" / name).read_bytes())
    os.close(writing)
    (tmp_path / "pipe" / name).symlink_to(f"/dev/fd/{reading}")  # to open it again would give nothing
    try:
        texts = list(read_texts(tmp_path / "pipe" / name))
    finally:
        os.close(reading)
    assert texts == list(read_texts(tmp_path / "file" / name)) != []


def test_splits_of_a_data_set_that_was_kept(tmp_path):
    train, other = (datasets.Dataset.from_list([{"text": f"{of} {i}"} for i in range(4)]) for of in "ab")
    datasets.DatasetDict({"train": train, "validation": other}).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    for split, seen in {"train[:2]": ["a 0", "a 1"], "train[3:]+validation[:25%]": ["a 3", "b 0"]}.items():
        assert list(read_texts(tmp_path / "both", dataset_split=split)) == seen
    assert list(read_texts(tmp_path / "one", dataset_split="train[:2]", characters=99)) == ["a 0", "a 1"]
    for split in ("test", "train[:", "test[:2]"):
        with pytest.raises(TwofoldError, match=r"both has no `dataset_split=.*`; its splits are train, validation"):
            list(read_texts(tmp_path / "both", dataset_split=split))


@pytest.mark.parametrize(
    "cell",
    [
        '{"from": "LON", "to": "PAR"}',
        '{"role": "admin", "content": "x"}',
        '[{"role": "user", "id": 3}]',
        "[1]",
        "[",
        '"a"',
    ],
)
def test_a_cell_that_holds_json_but_no_turns_is_text(cell, tmp_path):
    table(tmp_path / "rows.csv", [{"prompt": "q ", "completion": cell}])
    assert list(read_texts(tmp_path / "rows.csv")) == [f"q {cell}"]


def test_tables_as_pandas_writes_them(tmp_path):
    frame = pandas.DataFrame({"instruction": ["Hi", "Hi"], "input": [None, "you"], "output": ["Ho", "Ho"]})
    frame.to_csv(tmp_path / "a.csv")
    pandas.read_csv(tmp_path / "a.csv").to_csv(tmp_path / "b.csv")
    frame.iloc[[0, 1]].to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in pandas.read_csv(tmp_path / "a.csv").to_dict("records"))
    )
    for name in ("a.csv", "b.csv", "c.parquet", "d.jsonl"):
        tally = Tally()
        assert list(read_texts(tmp_path / name, tally=tally)) == ["Hi\n\nHo", "Hi\n\nyou\n\nHo"], name
        assert not tally.sentences
    for content, said in (
        ("text,text\na,b\n", "more than one column 'text'"),
        ("text\na,b\n", "row 1: it has more cells"),
    ):
        (tmp_path / "e.csv").write_text(content)
        with pytest.raises(TwofoldError, match=said):
            list(read_texts(tmp_path / "e.csv"))


@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_an_unwanted_answer_is_a_bad_row_however_its_mark_is_written(key, tmp_path):
    for mark in (False, 0, 0.0, "False", "false", "0", True, 1, "True", 2, "spam"):
        row = {"prompt": "q", "completion": "a", key: mark}
        for name, write in {"rows.jsonl": WAYS["lines.jsonl"], "rows.csv": table}.items():
            write(tmp_path / name, [row])
            if str(mark).lower() in ("false", "0", "0.0"):
                with pytest.raises(TwofoldError, match=f"its '{key}' is false"):
                    read_rows([str(tmp_path / name)])
            else:
                read = read_rows([str(tmp_path / name)]).rows[0]
                assert read.unread == ((key,) if mark in (2, "spam") else ())
        (tmp_path / "rows.jsonl").write_text(lines([{"text": "Of a class.", key: mark}]))
        assert read_rows([str(tmp_path / "rows.jsonl")]).rows[0].unread == (key,)


def test_a_text_column_that_no_row_has_and_rows_without_text_are_said(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([{"text": "a"}, {"text": "b"}]))
    assert read_rows([str(path)], text_column="body").tally.sentences == [
        "no row has the text column 'body', so each was read by its format"
    ]
    path.write_text(lines([{"text": "a"}, {"body": "b"}]))
    assert not read_rows([str(path)], text_column="body").tally.sentences
    path.write_text(lines([{"text": " "}] * 2))
    with pytest.raises(TwofoldError, match=r"no rows in .* but 2 without any text;"):
        read_rows([str(path)])


def test_a_field_of_another_name_and_turns_of_a_prompt(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([{"body": "A text.", "text": "no"}, {"prompt": "Hi ", "completion": "Ho"}]))
    tokenizer = tokenizer_with(FULL)
    how = {"text_column": "body", "chat": True}
    expected = ["A text.", "<user>Hi</><assistant>Ho</>"]
    assert list(read_texts(path, tokenizer=tokenizer, **how)) == expected == tuned(path, tokenizer, **how)


# --- What is learnt of a conversation

WORDS = st.text("abcxyz \n", min_size=1, max_size=8)
ODD = st.sampled_from(
    [None, 7, True, {"a": 1}, "", " ", [], [{"type": "image_url", "image_url": "x"}], [None], [{"text": 7}]]
)


@st.composite
def contents(draw: Any) -> Any:
    words = draw(WORDS)
    half = len(words) // 2
    parts = [{"type": "text", "text": words[:half]}, words[half:]]
    return draw(st.one_of(st.just(words), st.just(parts), *([ODD] if draw(st.integers(0, 4)) == 0 else [])))


@st.composite
def conversations(draw: Any) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(contents())})
        if draw(st.booleans()):
            arguments: Any = draw(st.dictionaries(st.sampled_from("pq"), st.sampled_from([1, "z", None]), max_size=2))
            arguments = json.dumps(arguments) if draw(st.booleans()) else arguments
            call = {"id": "c", "type": "function", "function": {"name": "area", "arguments": arguments}}
            turns.append({"role": "assistant", "content": draw(st.one_of(st.none(), WORDS)), "tool_calls": [call]})
            turns.append({"role": "tool", "content": draw(contents()), "weight": draw(st.sampled_from([None, 1]))})
        turns.append({"role": "assistant", "content": draw(contents())})
    for turn in turns:
        if turn["role"] == "assistant":
            marks = [{}, {}, {"weight": 0}, {"weight": 1}, {"train": False}, {"training": True}, {"weight": None}]
            turn |= draw(st.sampled_from(marks))
    return {"messages": turns}


def words_of(content: Any) -> str | None:
    """Return what a content says; None if it is none."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and "image_url" not in part else part for part in content]
        return "".join(parts) if parts and all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else None


def expected_of(row: dict[str, Any]) -> str | None:
    """Return what is learnt of a conversation by the full template; None if it is a bad row."""
    said, any_learnt = "", False
    for turn in row["messages"]:
        words, calls = words_of(turn["content"]), turn.get("tool_calls", [])
        # An empty list of parts says as little as an empty text.
        words = "" if turn["content"] == [] and turn["role"] != "assistant" else words
        if not calls and (words is None or (turn["role"] == "assistant" and not words.strip())):
            return None
        if turn["role"] != "assistant" or turn.get("weight") == 0 or turn.get("train") is False:
            continue
        any_learnt = True
        arguments = [call["function"]["arguments"] for call in calls]
        arguments = [json.loads(held) if isinstance(held, str) else held for held in arguments]
        said += (words or "").strip() + "".join(f"[area {json.dumps(held)}]" for held in arguments) + "</>"
    return said if any_learnt else None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=conversations(), tooled=st.booleans())
def test_what_is_learnt_is_what_the_assistant_says_with_a_weight_or_the_row_is_refused(row, tooled, tmp_path):
    path = tmp_path / "row.jsonl"
    path.write_text(lines([row]))
    tokenizer = tokenizer_with(FULL if tooled else BARE)
    expected = expected_of(row)
    if not tooled and "tool_calls" in str(row):  # the template does not show them
        expected = None
    if expected is None:
        with pytest.raises(TwofoldError, match="line 1"):
            encode(read_rows([str(path)]).rows[0], tokenizer)
        with pytest.raises(TwofoldError, match=r"line 1.*`skip_bad`"):
            list(read_texts(path, tokenizer=tokenizer))
        return
    assert learnt(read_rows([str(path)]).rows[0], tokenizer) == expected
    assert [*read_texts(path, tokenizer=tokenizer)] == tuned(path, tokenizer)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Ho"]}}, "Ho</>"),  # a column of each field
        ({"conversation": [{"input": "Hi", "output": "WRONG", "output_with_loss": False}, {"output": "Ho"}]}, "Ho</>"),
        (
            {"conversations": [{"from": "user", "value": "Hi"}, {"from": "function_call", "value": "area(7)"}]},
            "area(7)</>",
        ),
        (
            {
                "messages": [ASKED, {"role": "assistant", "function_call": {"name": "area", "arguments": ""}}],
                "functions": [],
            },
            "[area {}]</>",
        ),
        ({"messages": [ASKED, {**SAID, "tool_calls": '[{"name": "area"}]', "content": None}]}, "[area {}]</>"),
        ({"prompt": "Hi", "chosen": [ASKED, SAID], "rejected": [ASKED]}, "Ho</>"),
        ({"prompt": "Hi", "completion": SAID}, "Ho</>"),
        ({"system": "Be brief.", "messages": [{"role": "developer", "content": "Be brief."}, ASKED, SAID]}, "Ho</>"),
        ({"instruction": "Hi", "input": None, "output": "Ho", "tools": "[]", "label": True}, "Ho</>"),
        ({"messages": [ASKED, SAID, {"role": "tool", "content": 'a "quoted"\nresult'}]}, "Ho</>"),
        ({"messages": [ASKED, SAID, {"role": "observation", "content": ""}, SAID], "text": "no"}, "Ho</>Ho</>"),
    ],
)
def test_other_ways_to_say_it(row, said, tmp_path):
    path = tmp_path / "row.jsonl"
    path.write_text(lines([row]))
    content = "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    tokenizer = tokenizer_with(FULL.replace("{{ m.content | trim }}", content))
    assert learnt(read_rows([str(path)]).rows[0], tokenizer) == said
    assert [*read_texts(path, tokenizer=tokenizer)] == tuned(path, tokenizer)


def test_a_weight_of_nothing_holds_when_all_is_learnt_too(tmp_path):
    path = tmp_path / "row.jsonl"
    path.write_text(lines([{"messages": [ASKED, {**SAID, "content": "WRONG", "weight": 0}, ASKED, SAID]}]))
    tokenizer = tokenizer_with(FULL)
    example = encode(read_rows([str(path)]).rows[0], tokenizer, loss="all")
    words = tokenizer.decode([label for label in example.labels if label != IGNORED])
    assert words == "<user>Hi</><assistant><user>Hi</><assistant>Ho</>"


# --- Bad rows

GOOD: list[Any] = [{"messages": [ASKED, SAID]}, {"text": "A text."}, {"prompt": "a", "completion": "b"}]
BAD: list[tuple[Any, str]] = [
    ("{", "it is not JSON"),
    ([1], "must be a JSON object, this is a list"),
    ({"riddle": "x"}, "a row needs"),
    ({"text": 7}, "'text' must be a text, it is a number"),
    ({"prompt": "a"}, 'there is no "completion"'),
    ({"prompt": "a", "completion": "b", "label": False}, "'label' is false"),
    ({"messages": "hello"}, "'messages' is a text that is not JSON"),
    ({"messages": [ASKED]}, "no turn of the assistant"),
    ({"messages": [ASKED, SAID, ASKED]}, "ends with a turn of the user"),
    ({"messages": [ASKED, {**SAID, "content": " "}]}, 'turn 2 of \'messages\' (assistant) has no "content"'),
    ({"messages": [ASKED, {**SAID, "content": {"a": 1}}]}, "must be a text, it is an object"),
    ({"messages": [{**ASKED, "content": None}, SAID]}, 'turn 1 of \'messages\' (user) has no "content"'),
    ({"messages": [{**ASKED, "content": [{"type": "image", "image": "x"}]}, SAID]}, "a part of type 'image'; only text"),
    ({"messages": [ASKED, {**SAID, "content": [{"type": "text", "text": None}]}]}, "whose 'text' must be a text, it is empty"),
    ({"messages": [ASKED, {**SAID, "weight": "0"}]}, "each turn of the assistant has the weight 0"),
    ({"messages": [ASKED, {**SAID, "weight": 0}]}, "each turn of the assistant has the weight 0"),
    ({"messages": [ASKED, {**SAID, "weight": 0.5}]}, "must be 0 or 1, it is 0.5"),
    ({"messages": [{**ASKED, "role": "critic"}, SAID]}, "the role 'critic', which is none of system"),
    ({"messages": [{**ASKED, "tool_calls": [{"name": "f"}]}, SAID]}, "which is for the assistant alone"),
    ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "not JSON"),
    ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"arguments": {}}]}]}, "has no name of a function"),
    ({"messages": [{"role": "system", "content": "a"}, ASKED, SAID], "system": "b"}, "leave one of the two out"),
    ({"messages": [ASKED, SAID], "tools": [7]}, "'tools' must be a list of objects"),
    ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' must be a list of pairs"),
    ({"prompt": "a", "chosen": [{**ASKED, "content": "b"}, SAID], "rejected": []}, "does not hold the prompt"),
    ({"chosen": "Human: a", "rejected": "Human: b"}, "there is no 'prompt'"),
    ({"conversation": [{"human": "a", "assistant": 7}]}, "in item 1 of the conversation 'assistant' must be a text"),
    ({"text": "\ud800"}, "half of a character"),
    ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}]}, "half of a"),
    # These are read, and the template refuses or does not show them.
    ({"messages": [ASKED, SAID], "tools": [{"name": "area"}]}, "the chat template leaves out the tool 'area'"),
    ({"messages": [ASKED, {**SAID, "tool_calls": [{"name": "area"}]}]}, "leaves out the call of a tool in turn 2"),
    ({"messages": [{"role": "system", "content": "Be brief."}, ASKED, SAID]}, "leaves out turn 1 (system)"),
    ({"messages": [ASKED, {**SAID, "content": "<think>Why?</think>Ho"}]}, "leaves out a part of turn 2 (assistant)"),
    ({"messages": [{**ASKED, "content": "refuse"}, SAID]}, "the chat template refuses it"),
]  # fmt: skip
PICKY = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}{% if m.role != 'system' %}"
    "<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</>{% endif %}{% endfor %}" + ASK
)


def both(path: Path, tokenizer: Any) -> tuple[Tally, list[str], Tally, list[str]]:
    """Return what both readers count and see, bad rows left out."""
    rows = read_rows([str(path)], skip_bad=True)
    made = encode_rows(rows.rows, tokenizer, length=999, loss="all", skip_bad=True, held_out=0, tally=rows.tally)
    seen = [tokenizer.decode(example.input_ids).removesuffix("<eos>") for example in made.train]
    tally = Tally()
    return rows.tally, seen, tally, list(read_texts(path, tokenizer=tokenizer, skip_bad=True, tally=tally))


@pytest.mark.parametrize(("row", "said"), BAD, ids=[said for _, said in BAD])
def test_a_bad_row_is_refused_in_the_same_sentence_by_all(row, said, tmp_path):
    path, tokenizer = tmp_path / "rows.jsonl", tokenizer_with(PICKY)
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) for line in (GOOD[0], "\n", row)) + "\n"
    )
    with pytest.raises(TwofoldError) as refused:
        list(read_texts(path, tokenizer=tokenizer))
    assert said in str(refused.value) and str(refused.value).startswith(f"{path}, line 2: ")
    with pytest.raises(TwofoldError) as also:
        encode_rows(read_rows([str(path)]).rows, tokenizer, length=999, held_out=0)
    assert str(also.value) == str(refused.value)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.sampled_from(GOOD + [row for row, _ in BAD]), max_size=9), place=st.integers(0, 9))
def test_bad_rows_that_are_left_out_are_counted_alike(rows, place, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.insert(place, GOOD[0])
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    one, seen, other, texts = both(path, tokenizer_with(PICKY))
    bad = sum(row not in GOOD for row in rows)
    assert one.skipped == other.skipped == bad and seen == texts and len(texts) == len(rows) - bad
    assert one.sentences == [*other.sentences] or bad > 1  # the first one that is met is not the same one


def test_what_no_format_has_and_no_template_shows_is_said_once_with_counts(tmp_path):
    rows = [
        {"messages": [ASKED, {**SAID, "reasoning_content": "Hm."}], "source": "a", "empty": "", "none": None},
        {"messages": [{**ASKED, "name": "Ann"}, SAID], "source": "b", "score": 0},
        {"text": " "},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": "1", "train": rows}))
    one, _, other, _ = both(path, tokenizer_with(BARE))
    assert (
        one.sentences
        == other.sentences
        == [
            "1 rows without any text left out",
            "fields of rows that are not read: 'source' (of 2), 'version of the file' (of 1), 'score' (of 1)",
            "fields of turns that the chat template does not show: 'reasoning_content' (of 1), 'name' (of 1)",
        ]
    )
    shown = tokenizer_with(BARE.replace("<{{ m.role }}>", "<{{ m.role }}>{{ m.reasoning_content }}{{ m.name }}"))
    assert not both(path, shown)[2].unshown


def test_without_a_template_conversations_are_calibrated_on_as_their_contents_and_that_is_said(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([{"messages": [ASKED, SAID]}]))
    tally = Tally()
    assert list(read_texts(path, tokenizer=make_tokenizer(), tally=tally)) == ["Hi\n\nHo"]
    assert tally.sentences == [
        "1 conversations read as their contents, a blank line between: the tokenizer has no chat template"
    ]
    path.write_text(lines([{"messages": [ASKED, SAID], "tools": [{"name": "area"}]}]))
    with pytest.raises(TwofoldError, match="line 1 is a conversation, and the tokenizer has no chat template"):
        list(read_texts(path, tokenizer=make_tokenizer()))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl.gz", b"no gzip", "can't be unpacked"),
        ("b.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:20], "can't be unpacked"),
        ("c.parquet", b"PAR1 and no table", "is not a table in Parquet that can be read"),
        ("d.csv", b'text\n"\xff"\n', "is not a text file in UTF-8"),
        ("e.jsonl", b'{"text": "\xff"}', "is not a text file in UTF-8"),
        ("f.jsonl", b"[" * 200_000, "line 1: it is not JSON"),
    ],
)
def test_files_that_can_not_be_read_are_told_alike(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    for read in (lambda path: read_rows([path]), lambda path: list(read_texts(path))):
        with pytest.raises(TwofoldError, match=said):
            read(str(tmp_path / name))


def test_a_calibration_and_an_evaluation_leave_bad_rows_out_if_asked_and_say_so(checkpoint, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([{"text": "Some words to read. " * 20}, {"text": 7}] * 5))
    asked = {"model": str(checkpoint), "keep": 0.6, "calibration": [str(path)], "tokens": 200, "window": 40}
    loaded = load_model(str(checkpoint))
    with pytest.raises(TwofoldError, match=r"line 2: 'text' must be a text.*`skip_bad`"):
        calibration_windows(loaded, Recipe(**asked), "mark")
    assert len(calibration_windows(loaded, Recipe(**asked, skip_bad=True), "mark").samples) == 5
    assert f"bad rows skipped (first: {path}, line 2: 'text' must be" in capsys.readouterr().err
    assert len(evaluation_windows(path, loaded.tokenizer, window=40, windows=2, skip_bad=True)) == 2
    assert f"bad rows skipped (first: {path}, line 2: 'text' must be" in capsys.readouterr().err
