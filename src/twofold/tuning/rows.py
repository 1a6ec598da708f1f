"""Rows to learn from: read from files or data sets, each checked, with the place that it came from.

A row is one of
    {"messages": [{"role": …, "content": …}, …]}, with an answer of the assistant; "conversations" with "from" and "value" too;
    {"prompt": …, "completion": …}, or "response" or "answer" in the place of "completion";
    {"instruction": …, "input": …, "output": …};
    {"text": …}.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.host.faults import errors_in_words
from twofold.host.quiet import first_line

MEND = "mend the row, or leave out such rows with `skip_bad`"
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
KINDS = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
ANSWERS = ("completion", "response", "answer", "output")


class BadRowError(ValueError):
    """A row that can't be learnt from: the message follows the place of the row."""


@dataclass(frozen=True)
class Row:
    """One row: turns of a conversation, or a prompt and its completion, or a text (then the prompt is empty)."""

    where: str
    turns: tuple[tuple[str, str], ...] = ()  # (role, content)
    prompt: str = ""
    completion: str = ""


@dataclass(frozen=True)
class Rows:
    """The rows of all sources, and what was left out."""

    rows: list[Row]
    skipped: int
    first_skipped: str = ""  # place and reason


def read_rows(
    sources: list[str], *, skip_bad: bool = False, dataset_config: str | None = None, dataset_split: str = "train"
) -> Rows:
    """Read and check all rows.

    Raises:
        TwofoldError: naming the line of the first bad row and what it lacks, unless bad rows are to be skipped; or if a source
            can't be read, or there is no row.
    """
    rows: list[Row] = []
    skipped, first = 0, ""
    for source in sources:
        for where, value in _values(source, dataset_config, dataset_split):
            try:
                if isinstance(value, BadRowError):
                    raise value
                rows.append(make_row(value, where))
            except BadRowError as error:
                if not skip_bad:
                    raise TwofoldError(f"{where}: {error}; {MEND}") from error
                skipped += 1
                first = first or f"{where}: {error}"
    if not rows:
        bad = f" but {skipped} bad ones, first {first}" if skipped else ""
        raise TwofoldError(
            f"there are no rows in {', '.join(sources)}{bad}; name a file with one JSON object on each line"
        )
    return Rows(rows, skipped, first)


def data_files(source: str) -> list[Path]:
    """Return the files and folders of this machine that a source names; none if it is a data set of the hub."""
    path = Path(source).expanduser()
    if _is_pattern(path):
        return [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (patterns may be absolute)
    return [path] if path.exists() else []


def _is_pattern(path: Path) -> bool:
    return any(sign in str(path) for sign in "*?[") and not path.exists()


def make_row(value: Any, where: str) -> Row:
    """Check one row.

    Raises:
        BadRowError: saying what is missing or wrong.
    """
    if not isinstance(value, dict):
        raise BadRowError(f"a row must be a JSON object, this is {_kind(value)}")
    if "messages" in value or "conversations" in value:
        return Row(where, turns=_turns(value))
    if "instruction" in value:
        prompt = _text(value, "instruction")
        extra = _text(value, "input", empty=True) if value.get("input") is not None else ""
        return Row(where, prompt=f"{prompt}\n\n{extra}\n\n" if extra else f"{prompt}\n\n", completion=_answer(value))
    if "prompt" in value:
        if isinstance(value["prompt"], list):  # conversational prompt and completion
            return Row(where, turns=_turns({"messages": [*value["prompt"], *_list(value, "completion")]}))
        return Row(where, prompt=_text(value, "prompt", empty=True), completion=_answer(value))
    if "text" in value:
        return Row(where, completion=_text(value, "text"))
    keys = ", ".join(map(repr, list(value)[:5])) or "nothing"
    raise BadRowError(f'a row needs "messages", "prompt" with "completion", or "text", this one has {keys}')


def _turns(value: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    key = "messages" if "messages" in value else "conversations"
    turns = []
    for number, turn in enumerate(_list(value, key), 1):
        if not isinstance(turn, dict):
            raise BadRowError(f"turn {number} of {key!r} must be an object, it is {_kind(turn)}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not role:
            raise BadRowError(f'turn {number} of {key!r} has no "role"')
        role = ROLES.get(role, role)
        if not isinstance(content, str) or (role == "assistant" and not content.strip()):
            raise BadRowError(f'turn {number} of {key!r} ({role}) has no "content"')
        turns.append((role, _whole(content, "content")))
    if not any(role == "assistant" for role, _ in turns):
        raise BadRowError(f"{key!r} has no turn of the assistant, so there is no answer to learn")
    return tuple(turns)


def _answer(value: dict[str, Any]) -> str:
    key = next((key for key in ANSWERS if key in value), None)
    if key is None:
        raise BadRowError(f'there is no "completion" (nor {", ".join(map(repr, ANSWERS[1:]))})')
    return _text(value, key)


def _text(value: dict[str, Any], key: str, *, empty: bool = False) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise BadRowError(f"{key!r} must be a text, it is {_kind(text)}")
    if not empty and not text.strip():
        raise BadRowError(f"{key!r} is empty")
    return _whole(text, key)


def _whole(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"{key!r} holds half of a character (a lone surrogate)") from error
    return text


def _list(value: dict[str, Any], key: str) -> list[Any]:
    turns = value.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"{key!r} must be a list of turns, it is {_kind(turns)}")
    return turns


def _kind(value: Any) -> str:
    return "empty" if value in ([], "", None) else KINDS.get(type(value), type(value).__name__)


def _values(source: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """Yield each row of a source with its place; a line that is no JSON comes as the error that it is."""
    path = Path(source).expanduser()
    if _is_pattern(path):
        files = data_files(source)
        if not files:
            raise TwofoldError(f"no file matches {source}; check the path")
        for file in files:
            yield from _values(str(file), config, split)
    elif path.is_dir():
        raise TwofoldError(f"{source} is a folder: name the files in it, as in {source.rstrip('/')}/*.jsonl")
    elif path.is_file():
        yield from _lines(path, source)
    elif path.suffix in (".jsonl", ".json", ".txt") or source.startswith((".", "/", "~")):
        raise TwofoldError(f"there is no file {source}; check the path")
    else:
        yield from _dataset(source, config, split)


def _lines(path: Path, source: str) -> Iterator[tuple[str, Any]]:
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(rows, list):
                raise TwofoldError(
                    f"{source} must be a JSON list of rows; a file with one row on each line is a .jsonl"
                )
            yield from ((f"{source}, row {number}", row) for number, row in enumerate(rows, 1))
            return
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{source}, line {number}", _parsed(line)
    except TwofoldError:
        raise
    except UnicodeDecodeError as error:
        raise TwofoldError(f"{source} is not a text file in UTF-8; convert it first") from error
    except (ValueError, RecursionError) as error:
        raise TwofoldError(f"{source} is not JSON: {error}") from error
    except OSError as error:
        raise TwofoldError(f"{source} can't be read: {error.strerror}") from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRowError(f"it is not JSON ({error.msg if isinstance(error, json.JSONDecodeError) else error})")


def _dataset(name: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    with errors_in_words(lambda e: f"{name} is neither a file nor a data set that can be read: {first_line(e)}"):
        rows = load_dataset(name, config, split=split)
    yield from ((f"{name} ({split}), row {number}", dict(row)) for number, row in enumerate(rows, 1))
