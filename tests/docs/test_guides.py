"""Each guide runs as it is written, on a tiny Llama and a page of text in the place of the reader's own.

The Spanish ones have the code of the English ones to the letter, but for comments, so that it runs once.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from guide import Folder, blocks_of
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import CONFIGS, TEXT, make_tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))
SPANISH = sorted((DOCS / "guides" / "es").glob("*.md"))


def name(path: Path) -> str:
    return path.relative_to(DOCS / "guides").as_posix()


@pytest.fixture(scope="session")
def _readers_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with as many positions as commands ask for by default, and a chat template."""
    folder = tmp_path_factory.mktemp("readers")
    torch.manual_seed(0)
    config = LlamaConfig(**{**CONFIGS["llama"]().to_dict(), "max_position_embeddings": 2048})
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reader(tmp_path: Path, _readers_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader: a model, texts to calibrate on, others to measure on, and conversations to tune on."""
    folder = tmp_path / "reader"
    shutil.copytree(_readers_model, folder / "my-model")
    (folder / "train.txt").write_text(TEXT, encoding="utf-8")
    (folder / "held-out.txt").write_text(TEXT.replace("river", "sea"), encoding="utf-8")
    places = [("Arles", "south"), ("Bruges", "north"), ("Cádiz", "south"), ("Derry", "north")]
    rows = [
        [{"role": "user", "content": f"Where is {city}?"}, {"role": "assistant", "content": f"In the {side}."}]
        for city, side in places * 4
    ]
    lines = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    (folder / "chat.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_every_block_runs_as_it_is_written(page: Path, reader: Path):
    with Folder(reader, page) as folder:
        for block in blocks_of(page.read_text(encoding="utf-8")):
            folder.run(block)


@pytest.mark.parametrize("page", SPANISH, ids=name)
def test_both_languages_have_the_same_code(page: Path):
    english = DOCS / "guides" / page.name
    codes = [
        [block.same_code() for block in blocks_of(path.read_text(encoding="utf-8")) if block.language != "text"]
        for path in (english, page)
    ]
    assert codes[0] == codes[1]


def test_a_block_that_fails_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in ("```python\n1 / 0\n```", "```bash\ntwofold inspect ./nowhere\n```", "```bash\nfalse\n```"):
        (block,) = blocks_of(code)
        with Folder(tmp_path, tmp_path / "page.md") as folder, pytest.raises((ZeroDivisionError, AssertionError)):
            folder.run(block)


def test_no_block_is_left_out_in_silence():
    for page in (
        "```console\n$ ls\n```",
        "```\nls\n```",
        "<!-- not run: it is long -->\n\n```text\nls\n```",
        "~~~\n```",
    ):
        with pytest.raises(ValueError, match=r"line|closed"):
            blocks_of(page)
    marked, bare, file = blocks_of(
        '<!-- not run: needs Docker -->\n```bash\nx\n```\n<!-- not run: -->\n```bash\ny\n```\n```yaml title="a"\nz\n```'
    )
    assert (marked.runs, marked.reason) == (False, "needs Docker")
    assert bare.runs and not file.runs and file.title == "a"
