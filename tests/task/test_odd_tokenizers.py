"""Tokenizers that lack something, or have too much, with every command: a right result or one sentence."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import twofold
import twofold.cli
from conftest import TEXT, VOCABULARY, make_model, make_tokenizer
from twofold.exports.compare import prompts as export_prompts
from twofold.model.load import LoadedModel, load_model, load_skeleton, load_tokenizer
from twofold.serving.chat import Conversation
from twofold.task.text.special import end_id, pad_id, prompt_ids
from twofold.tuning.prepare import name_the_end
from twofold.tuning.rows import Row
from twofold.tuning.samples import held_out_prompts
from twofold.tuning.tokens import Examples, encode

pytestmark = pytest.mark.long
CHATML = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def lacking(*names: str) -> Callable[[Path], None]:
    """Take special tokens away."""

    def write(folder: Path) -> None:
        tokenizer = make_tokenizer()
        for name in names:
            setattr(tokenizer, name, None)
        tokenizer.save_pretrained(folder)

    return write


def changed(change: Callable[[PreTrainedTokenizerFast], object]) -> Callable[[Path], None]:
    """Change the tokenizer before it is written."""

    def write(folder: Path) -> None:
        tokenizer = make_tokenizer()
        change(tokenizer)
        tokenizer.save_pretrained(folder)

    return write


def beyond(name: str) -> Callable[[PreTrainedTokenizerFast], object]:
    """Add tokens until one is beyond the model's table, and give it a role."""

    def change(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.add_tokens([f"<extra {i}>" for i in range(10)])
        tokenizer.add_special_tokens({name: f"<{name} beyond>"})

    return change


def every_text_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    given = {"single": "<bos> $A <eos>", "special_tokens": [("<bos>", 256), ("<eos>", 257)]}
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(**given)


def knows_nothing(folder: Path, unknown: str | None = "<unk>") -> None:
    """Write a tokenizer that has no token for any text."""
    vocabulary = {"<unk>": 0, "<eos>": 1, "\u2603": 2}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>" if unknown else "\u2603 none"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token=unknown).save_pretrained(folder)


def edited(**settings: object) -> Callable[[Path], None]:
    """Change tokenizer_config.json."""

    def write(folder: Path) -> None:
        make_tokenizer().save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return write


def ends(*ids: int, lack: tuple[str, ...] = ("eos_token",)) -> Callable[[Path], None]:
    """Let only the model's configuration name what ends a text."""

    def write(folder: Path) -> None:
        lacking(*lack)(folder)
        for name in ("generation_config.json", "config.json"):
            path = folder / name
            path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(ids)}))

    return write


def has_code_of_its_own(folder: Path) -> None:
    settings = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["mine.MineTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text("raise SystemError('nobody has asked to run this')")


def needs_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


def broken(folder: Path) -> None:
    make_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "no pad": lacking("pad_token"),
    "no end": lacking("eos_token"),
    "no begin": lacking("bos_token"),
    "no special tokens": lacking("bos_token", "eos_token", "pad_token"),
    "pad is the end": changed(lambda tokenizer: setattr(tokenizer, "pad_token", "<eos>")),
    "several ends": ends(257, 300),
    "an end without a word": ends(263, lack=("eos_token", "pad_token")),
    "pad beyond": changed(beyond("pad_token")),
    "end beyond": changed(beyond("eos_token")),
    "begin beyond": changed(beyond("bos_token")),
    "texts begin and end": changed(every_text_begins),
    "chat template": changed(lambda tokenizer: setattr(tokenizer, "chat_template", CHATML)),
    "template with a token beyond": changed(
        lambda tokenizer: (beyond("pad_token")(tokenizer), setattr(tokenizer, "chat_template", "<extra 9>" + CHATML))
    ),
    "template that fails": changed(
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    ),
    "tiny model_max_length": edited(model_max_length=4),
    "huge model_max_length": edited(model_max_length=10**30),
    "all unknown": knows_nothing,
    "no unknown token": lambda folder: knows_nothing(folder, None),
    "sentencepiece": needs_sentencepiece,
    "unknown class": edited(tokenizer_class="NoSuchTokenizer"),
    "own code": has_code_of_its_own,
    "broken": broken,
    "none": lambda folder: None,
}
NO_TOKENIZER = {
    "none": "has no tokenizer (its folder has no tokenizer.json",
    "sentencepiece": "pip install sentencepiece",
    "own code": "has code of its own; look at its *.py files, and run them by --trust-remote-code",
    "broken": "has no tokenizer",
}
CANNOT = NO_TOKENIZER | {"no unknown token": "the tokenizer can't encode a text"}
BEYOND = "only 264 embeddings"
REFUSED: dict[str, dict[str, str]] = {  # command → tokenizer → what the sentence says; with all others it works
    "evaluate": CANNOT | {"all unknown": "is unknown to the tokenizer"},
    "plan": CANNOT | {"all unknown": "is unknown to the tokenizer"},
    "self": CANNOT | {"template with a token beyond": BEYOND},
    "compress": CANNOT,
    "compare": CANNOT,
    "chat": CANNOT
    | dict.fromkeys(("pad beyond", "end beyond", "begin beyond", "template with a token beyond"), BEYOND)
    | {"template that fails": "refuses the conversation"},
    "tune": CANNOT | {"end beyond": BEYOND, "all unknown": "is unknown to the tokenizer"},
    "tune rows with a token beyond": {"pad beyond": BEYOND},
}
ALL = list(TOKENIZERS)
TRIED = {  # where a run takes a second or more, those that its own steps differ with
    "evaluate": ALL,
    "chat": ALL,
    "self": ALL,
    "plan": ["begin beyond", "texts begin and end", "tiny model_max_length", "all unknown", "no unknown token", "none"],
    "compress": ["template with a token beyond", "no special tokens", "none"],
    "compare": ["texts begin and end", "no unknown token"],
    "tune": ["no special tokens", "several ends", "an end without a word", "own code", "pad beyond", "end beyond",
             "texts begin and end", "all unknown",
             "no unknown token", "tiny model_max_length", "sentencepiece"],
    "tune rows with a token beyond": ["pad beyond"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model with each tokenizer, a text and rows."""
    root = tmp_path_factory.mktemp("odd")
    (root / "text.txt").write_text(TEXT)
    rows = [{"prompt": "How old?", "completion": "very " * (i % 5) + "old"} for i in range(8)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "beyond.jsonl").write_text('{"text": "it is <extra 9>"}\n' * 8)
    made = {"": root}
    for name, write in TOKENIZERS.items():
        made[name] = root / name
        make_model().save_pretrained(root / name)
        write(root / name)
    return made


def arguments(command: str, model: Path, root: Path, out: Path) -> list[object]:
    text = root / "text.txt"
    small: list[object] = ["--tokens", 64, "--window", 16, "--quiet"]
    tune: list[object] = [
        "tune",
        model,
        "--steps",
        1,
        "--batch",
        4,
        "--micro-batch",
        4,
        "--out",
        out,
        "--quiet",
        "--data",
    ]
    return {
        "compress": ["compress", model, "--keep", 0.6, "--calibration", text, *small, "--eval-windows", 1, "--out", out],
        "self": ["plan", model, "--keep", 0.6, "--calibration", "self", *small],
        "plan": ["plan", model, "--keep", 0.6, "--calibration", text, *small],
        "evaluate": ["evaluate", model, "--text", text, "--window", 16, "--windows", 2, "--quiet"],
        "tune": [*tune, root / "rows.jsonl"],
        "tune rows with a token beyond": [*tune, root / "beyond.jsonl"],
        "chat": ["chat", model, "--max-tokens", 2],
        "compare": ["compare", model, "--objectives", "svd-llm", "--allocate", "uniform", "--keep", 0.6, "--baselines", "none",
                    "--calibration", text, *small, "--eval-windows", 1, "--out", out],
    }[command]  # fmt: skip


@pytest.mark.parametrize("command", TRIED)
def test_a_tokenizer_that_lacks_something_gives_a_result_or_one_sentence(
    command: str, folders: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    for name in TRIED[command]:
        given = ["twofold", *map(str, arguments(command, folders[name], folders[""], tmp_path / name))]
        monkeypatch.setattr(sys, "argv", given)
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nSay <extra 9>\n"))
        with pytest.raises(SystemExit) as stop:
            twofold.cli.main()
        said = capsys.readouterr().err
        expected = REFUSED[command].get(name)
        assert (stop.value.code or 0) == (0 if expected is None else 2), f"{name}: {said}"
        if expected is not None:
            last = said.strip().splitlines()[-1]
            assert last.startswith("twofold: ") and expected in last, f"{name}: {said}"
        assert "indexing errors" not in said and "Traceback" not in said, f"{name}: {said}"


def test_what_is_not_done_for_a_lack_is_said(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    text, small = str(folders[""] / "text.txt"), {"tokens": 64, "window": 16, "eval_windows": 1, "quiet": True}
    name = "template with a token beyond"
    run = twofold.compress(str(folders[name]), tmp_path / "out", keep=0.6, calibration=text, **small)
    assert len(run.samples) == 1, "the other prompt has no template"
    assert any("no sample answer to 'What is" in note and BEYOND in note for note in run.notes)


@pytest.mark.parametrize(
    ("name", "pads", "ends"),
    [
        ("no pad", 257, 257),
        ("no end", 258, 257),  # as config.json says
        ("no special tokens", 257, 257),
        ("pad is the end", 257, 257),
        ("several ends", 258, 257),
        ("an end without a word", 0, None),
        ("pad beyond", 257, 257),
        ("end beyond", 258, 257),
        ("none", 257, 257),
    ],
)
def test_one_place_says_which_id_pads_and_which_ends(
    name: str, pads: int, ends: int | None, folders: dict[str, Path]
) -> None:
    model = load_skeleton(str(folders[name])).model
    tokenizer = None if name == "none" else load_tokenizer(str(folders[name]))
    assert (pad_id(tokenizer, model), end_id(tokenizer, model)) == (pads, ends)
    model.generation_config.eos_token_id = None
    assert pad_id(tokenizer, model) < VOCABULARY, "some id of the table, whatever is missing"


@pytest.mark.parametrize("post", ["$A", "<bos> $A", "<bos> $A <eos>", "$A <eos>"])
def test_what_is_gone_on_with_begins_as_texts_do_and_does_not_end(post: str) -> None:
    tokenizer = make_tokenizer()
    special = [("<bos>", 256), ("<eos>", 257)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=special)
    begin, letters = [256] * post.startswith("<bos>"), tokenizer("ab", add_special_tokens=False)["input_ids"]
    loaded = LoadedModel(make_model(), tokenizer, "tiny", None, torch.float32)
    assert prompt_ids(tokenizer, "ab") == prompt_ids(tokenizer, "<bos>" * len(begin) + "ab") == [*begin, *letters]
    assert prompt_ids(tokenizer, "ab", rendered=True) == letters
    talk = Conversation(loaded, None, 4, 0.0)
    assert talk._ids([{"role": "user", "content": "ab"}]).tolist() == [[*begin, *letters]]
    assert all(257 not in ids and ids[0, : len(begin)].tolist() == begin for ids in export_prompts(loaded))
    row = encode(Row("1", prompt="ab", completion="c"), tokenizer)
    (sampled,) = held_out_prompts(Examples([row], [row]))
    assert sampled == [*begin, *letters], "sample answers begin as what was learnt"


def test_rows_end_with_the_end_that_the_configuration_names(folders: dict[str, Path]) -> None:
    tokenizer, model = load_tokenizer(str(folders["no end"])), load_skeleton(str(folders["no end"])).model
    (said,) = name_the_end(tokenizer, model)
    assert "<eos>" in said and encode(Row("1", prompt="How old?", completion=" old"), tokenizer).input_ids[-1] == 257
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    (said,) = name_the_end(tokenizer, model)
    assert "does not learn where an answer ends" in said
    assert (
        tokenizer.decode(encode(Row("1", prompt="How old?", completion=" old"), tokenizer).input_ids) == "How old? old"
    )


def test_the_server_refuses_a_token_beyond_the_table(folders: dict[str, Path]) -> None:
    pytest.importorskip("fastapi")
    from fastapi import HTTPException

    from twofold.serving.generation import Answers

    loaded = load_model(str(folders["pad beyond"]))
    ids = loaded.tokenizer("Say <extra 9>", return_tensors="pt")
    with pytest.raises(HTTPException) as refused:
        Answers(loaded, 128)._prepare(ids, loaded.model.generation_config)
    assert refused.value.status_code == 400 and BEYOND in refused.value.detail
