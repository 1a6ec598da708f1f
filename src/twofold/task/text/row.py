"""A row of text: the turns of a conversation, or a prompt and its completion, or a text; and what became of all rows of a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isnan
from typing import Any

from twofold.errors import TwofoldError
from twofold.host.progress import say

MEND = "mend the row, or leave out such rows with `skip_bad`"
KINDS = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
MOST_NAMED = 8  # fields that a sentence lists


class BadRowError(ValueError):
    """A row that can't be read: the message follows the place of the row."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: str  # system, user, assistant, tool
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)  # tool_calls, and what else the template is given of the turn
    learnt: bool = True  # False: it is marked as one that is not learnt

    @property
    def message(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class Row:
    """One row: turns of a conversation, or a prompt and its completion, or a text (then the prompt is empty)."""

    where: str
    turns: tuple[Turn, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()  # that the assistant may call
    prompt: str = ""
    completion: str = ""
    unread: tuple[str, ...] = ()  # fields that hold something and are no part of the format

    @property
    def chat(self) -> Row:
        """Return the row with a prompt and its completion as one turn each."""
        if self.turns or not self.prompt:
            return self
        turns = (Turn("user", self.prompt.strip()), Turn("assistant", self.completion))
        return Row(self.where, turns, unread=self.unread)


class Fields:
    """The fields of a row, that remember which of them were read. A field that is null, or pandas' NaN, is not there."""

    def __init__(self, value: Mapping[str, Any]) -> None:
        self.values = {
            key: held
            for key, held in value.items()
            if held is not None and not (isinstance(held, float) and isnan(held))
        }
        self._read: set[str] = set()

    def has(self, *keys: str) -> str | None:
        """Return the first of some keys that is there."""
        return next((key for key in keys if key in self.values), None)

    def take(self, *keys: str) -> Any:
        """Return what stands under the first of some keys that is there, and count it as read; None if none is."""
        key = self.has(*keys)
        if key is None:
            return None
        self._read.add(key)
        return self.values[key]

    def text(self, *keys: str, empty: bool = False) -> str:
        """Return the text under the first of some keys.

        Raises:
            BadRowError: if there is none, it is no text, or it is blank and may not be.
        """
        key = self.has(*keys)
        if key is None:
            others = f" (nor {', '.join(map(repr, keys[1:]))})" if keys[1:] else ""
            raise BadRowError(f'there is no "{keys[0]}"{others}')
        text = self.take(key)
        if not isinstance(text, str):
            raise BadRowError(f"{key!r} must be a text, it is {kind(text)}")
        if not empty and not text.strip():
            raise BadRowError(f"{key!r} is empty")
        return whole(text, key)

    @property
    def unread(self) -> tuple[str, ...]:
        """List the fields that hold something and were not read."""
        return tuple(str(k) for k, held in self.values.items() if k not in self._read and held not in ("", [], {}))


def kind(value: Any) -> str:
    """Say in words what a JSON value is."""
    return "empty" if value in ([], "", None) else KINDS.get(type(value), type(value).__name__)


def whole(text: str, key: str) -> str:
    """Return a text.

    Raises:
        BadRowError: if it holds half of a character, which no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"{key!r} holds half of a character (a lone surrogate)") from error
    return text


def truth(value: Any) -> bool | None:
    """Return the truth value that a value stands for, as a number or in words too; None if it is none."""
    return {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}.get(
        str(value).strip().lower()
    )


def from_json(text: str) -> Any:
    """Return what a text of JSON stands for.

    Raises:
        BadRowError: if it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # beside no JSON: a number of too many digits, too much nesting
        said = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise BadRowError(f"it is not JSON ({said})") from error


def parsed(value: Any, key: str) -> Any:
    """Return a value, or what it stands for if it is a text that holds JSON, as tables and OpenAI's files write it.

    Raises:
        BadRowError: if it is a text of anything else.
    """
    if not isinstance(value, str):
        return value
    try:
        return from_json(value) if value.strip() else None
    except BadRowError as error:
        raise BadRowError(f"{key!r} is a text that is not JSON") from error


def parsed_if(text: str, fits: Callable[[Any], bool]) -> Any:
    """Return what a text stands for as JSON if that is a list or an object of some shape, or else the text as it is."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        value = from_json(text)
    except BadRowError:
        return text
    return value if fits(value) else text


@dataclass
class Tally:
    """What was left out of the rows of a run, so that it can be said once."""

    skipped: int = 0
    first_skipped: str = ""  # place and reason
    blank: int = 0  # rows whose text is empty
    unread: Counter[str] = field(default_factory=Counter)  # fields, and how many rows have them
    files: Counter[str] = field(default_factory=Counter)  # of folders that are not read, by the ends of their names
    unshown: Counter[str] = field(
        default_factory=Counter
    )  # the same for fields of turns that the chat template does not show
    otherwise: int = 0  # answers that can't be told in their conversation
    column: str | None = None  # the field that was named for the text, as long as no row has had it
    bare: int = 0  # conversations that were read as their contents alone

    def refuse(self, said: str, *, skip: bool, mend: str = MEND) -> None:
        """Refuse a bad row, or count it.

        Args:
            said: its place, and what is wrong with it.

        Raises:
            TwofoldError: unless it is to be skipped.
        """
        if not skip:
            raise TwofoldError(f"{said}; {mend}")
        self.skipped += 1
        self.first_skipped = self.first_skipped or said

    def tell(self) -> None:
        """Say what was left out."""
        for sentence in self.sentences:
            say(sentence)

    @property
    def sentences(self) -> list[str]:
        """Say what was left out, and of how many rows."""
        said = [f"{self.skipped:,} bad rows skipped (first: {self.first_skipped})"] if self.skipped else []
        if self.blank:
            said.append(f"{self.blank:,} rows without any text left out")
        if self.unread:
            said.append(f"fields of rows that are not read: {_counted(self.unread)}")
        if self.files:
            said.append(f"files of folders that are not read: {_counted(self.files)}")
        if self.unshown:
            said.append(f"fields of turns that the chat template does not show: {_counted(self.unshown)}")
        if self.otherwise:
            said.append(
                f"{self.otherwise:,} answers not learnt: the chat template renders them otherwise before further turns"
            )
        if self.column:
            said.append(f"no row has the text column {self.column!r}, so each was read by its format")
        if self.bare:
            said.append(
                f"{self.bare:,} conversations read as their contents, a blank line between: the tokenizer has no chat template"
            )
        return said


def _counted(fields: Counter[str]) -> str:
    named = [f"{name!r} (of {count:,})" for name, count in fields.most_common(MOST_NAMED)]
    more = len(fields) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
