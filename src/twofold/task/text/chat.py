"""Conversations through a tokenizer's chat template, and whether it shows all that a row holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from twofold.errors import TwofoldError
from twofold.host.quiet import first_line
from twofold.task.text.row import Row, Turn

CALLS = "tool_calls"
LINKS = ("id", "tool_call_id")  # of turns: they say which result belongs to which call, and few templates show them


class RefusedRowError(TwofoldError):
    """A row that the chat template refuses, or does not show, or that has nothing to learn."""


@dataclass(frozen=True)
class Shown:
    """A conversation as a chat template writes it."""

    row: Row  # with the arguments of calls as the template takes them
    text: str
    unshown: tuple[str, ...]  # fields of its turns that are not in it
    partly: tuple[int, ...] = ()  # places of earlier answers whose reasoning is not in it


def no_template(row: Row) -> TwofoldError:
    """Return the error of a conversation that there is no chat template for."""
    return TwofoldError(
        f"{row.where} is a conversation, and the tokenizer has no chat template; put one into its chat_template, or give rows "
        'with "prompt" and "completion"'
    )


def has_template(tokenizer: Any) -> bool:
    """Say whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(row: Row, tokenizer: Any, turns: int | None = None, *, ask: bool = False) -> str:
    """Return the first turns of a row, or all, by the chat template.

    Args:
        ask: with what comes before an answer.

    Raises:
        RefusedRowError: if the template refuses it.
    """
    messages = [turn.message for turn in row.turns[:turns]]
    tools = [*row.tools] or None
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # a template is data, and may refuse anything
        raise RefusedRowError(f"{row.where}: the chat template refuses it ({first_line(error)})") from error


def show(row: Row, tokenizer: Any) -> Shown:
    """Return a conversation by the chat template, which must show its turns, its calls of tools and its tools.

    A template leaves out in silence what it does not know. So the row is rendered once more with a word of our own in the place
    of each thing that it holds, and each of these words must appear; and each content must appear as it is.

    Raises:
        RefusedRowError: if the template refuses the row or does not show all of it.
    """
    row, text = _with_arguments(row, tokenizer)
    marks = _Marks()
    marked = replace(row, turns=marks.turns(row.turns), tools=marks.tools(row.tools))
    try:
        seen = render(marked, tokenizer)
    except RefusedRowError:  # it looks into what it is given: then that must do in the place of words of our own
        seen, marks = text, _Words()
        marks.turns(row.turns)
        marks.tools(row.tools)
    text = _ending(row, tokenizer, text) or text
    seen, packed, partly = _packed(seen), _packed(text), []
    missing = [*dict.fromkeys(what for mark, what in marks.needed.items() if _packed(mark) not in seen)]
    unshown = {what: None for mark, what in marks.wanted.items() if _packed(mark) not in seen}
    end = len(packed)
    for number, turn in reversed([*enumerate(row.turns, 1)]):
        place = _place(packed, turn, end if turn.role == "assistant" else None)
        if turn.role == "assistant" and place >= 0:
            end = place  # an answer stands before the next one, which may say the same
        if place >= 0 or _named(number, turn) in missing:
            continue
        beginning = replace(row, turns=row.turns[:number])
        if number < len(row.turns) and _ending(beginning, tokenizer, render(beginning, tokenizer)):
            partly.append(number - 1)  # it shows the reasoning of the last answer alone
            unshown["content of earlier answers, in part"] = None
        else:
            missing.append(f"a part of {_named(number, turn)}")
    if missing:
        raise RefusedRowError(
            f"{row.where}: the chat template leaves out {', '.join(missing[:3])}{' and more' if missing[3:] else ''}, so another "
            "conversation than this one would be read; give the tokenizer a template that shows it, or take it out of the row"
        )
    return Shown(row, text, tuple(unshown), tuple(partly))


def _ending(row: Row, tokenizer: Any, text: str) -> str | None:
    """Return the text of a conversation with all of the answer that it ends with; None if there is none, or not all is shown.

    Some templates ask for reasoning (<think>) and leave that of an answer out, as what comes before does not count for the next
    one. Then the answer is put as it stands into its place.
    """
    last = row.turns[-1]
    if last.role != "assistant" or _place(_packed(text), last) >= 0:
        return text if last.role == "assistant" else None
    asked = render(row, tokenizer, len(row.turns) - 1, ask=True)
    opening = asked[common(asked, text) :].strip()
    if not opening or not last.content.lstrip().startswith(opening):
        return None
    word = _Marks().word(last)
    marked = render(replace(row, turns=(*row.turns[:-1], replace(last, content=word))), tokenizer)
    return marked.replace(word, last.content.strip()) if marked.count(word) == 1 else None


def _with_arguments(row: Row, tokenizer: Any) -> tuple[Row, str]:
    """Return a row with the arguments of calls as a chat template writes them as JSON, and its text.

    Some templates take an object and write it as JSON, others take the text and would write an object in Python's notation. A
    third kind writes the arguments of an object one by one, in a notation of its own.

    Raises:
        RefusedRowError: if the template refuses the row, or writes the arguments in neither way.
    """
    arguments = [call["function"]["arguments"] for turn in row.turns for call in turn.more.get(CALLS, ())]
    if not arguments:
        return row, render(row, tokenizer)
    refused: RefusedRowError | None = None
    objects: str | None = None
    for form in (row, replace(row, turns=tuple(map(_with_texts, row.turns)))):
        try:
            text = render(form, tokenizer)
        except RefusedRowError as error:
            refused = refused or error
            continue
        if _write_json(text, arguments, row):
            return form, text
        objects = text if form is row else objects
    if objects is not None and not any(held and str(held) in objects for held in arguments):
        nested = [held for each in arguments for held in each.values() if held and isinstance(held, list | dict)]
        if _write_json(objects, nested, row):
            return row, objects
    if refused is not None and objects is None:
        raise refused
    raise RefusedRowError(
        f"{row.where}: the chat template does not write the arguments of a call of a tool as JSON; give the tokenizer a template "
        "that does, or take the call out of the row"
    )


def _with_texts(turn: Turn) -> Turn:
    """Return a turn with the arguments of its calls as texts of JSON."""
    if CALLS not in turn.more:
        return turn
    calls = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
        for call in turn.more[CALLS]
    ]
    return replace(turn, more={**turn.more, CALLS: calls})


def _write_json(text: str, values: list[Any], row: Row) -> bool:
    """Say whether a text holds values as JSON, each as often as there are of it beside the contents of the turns."""
    packed, contents = _packed(text), [_packed(turn.content) for turn in row.turns]
    written = [{_packed(_json(held)), _packed(json.dumps(held))} for held in values if held]
    return all(
        any(packed.count(form) >= written.count(forms) + sum(held.count(form) for held in contents) for form in forms)
        for forms in written
    )


def _json(held: Any) -> str:
    return json.dumps(held, ensure_ascii=False, default=str)


def _place(packed: str, turn: Turn, end: int | None = None) -> int:
    """Return where the content of a turn stands last in a text without white space, before some place; -1 if it does not.

    Some templates write the results of tools as JSON.
    """
    forms = (turn.content, json.dumps(turn.content, ensure_ascii=False)[1:-1])
    return max(packed.rfind(_packed(form), 0, end) for form in forms)


def common(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the length of the beginning that two lists or texts share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _named(number: int, turn: Turn) -> str:
    return f"turn {number} ({turn.role})"


def _packed(text: str) -> str:
    """Return a text without white space, which templates trim and add."""
    return "".join(text.split())


@dataclass
class _Marks:
    """Rows with a word of our own in the place of each thing that they hold."""

    needed: dict[str, str] = field(default_factory=dict)  # words, and what they stand for
    wanted: dict[str, str] = field(default_factory=dict)

    def turns(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """Return turns with marks in them."""
        return tuple(self._turn(turn, _named(number, turn)) for number, turn in enumerate(turns, 1))

    def tools(self, tools: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        """Return tools with marks for names."""
        functions = [tool["function"] for tool in tools]
        marked = [
            {**f, "name": self.mark(f["name"], f"the tool {f['name']!r}")} if "name" in f else f for f in functions
        ]
        return tuple({**tool, "function": function} for tool, function in zip(tools, marked, strict=True))

    def _turn(self, turn: Turn, what: str) -> Turn:
        more = {key: self._more(key, held, what) for key, held in turn.more.items()}
        return replace(turn, content=self.content(turn.content, what), more=more)

    def _more(self, key: str, held: Any, what: str) -> Any:
        if key == CALLS:
            return [
                {**call, "function": self._call(call["function"], f"the call of a tool in {what}")} for call in held
            ]
        return held if key in LINKS else self.mark(held, key, needed=False)

    def _call(self, function: Mapping[str, Any], what: str) -> dict[str, Any]:
        name = self.mark(function["name"], what)
        arguments = function["arguments"]
        values = json.loads(arguments) if isinstance(arguments, str) else arguments
        marked = {key: self.mark(held, what) for key, held in values.items()}
        return {"name": name, "arguments": _json(marked) if isinstance(arguments, str) else marked}

    def content(self, content: str, what: str) -> str:
        """Return a content with its mark, if there is anything in it."""
        return self.mark(content, what) if content.strip() else content

    def mark(self, held: Any, what: str, *, needed: bool = True) -> str:
        """Return the word that stands for something."""
        word = self.word(held)
        (self.needed if needed else self.wanted)[word] = what
        return word

    def word(self, held: Any) -> str:
        """Return a word that no row holds."""
        return f"zq{len(self.needed) + len(self.wanted)}qz"


class _Words(_Marks):
    """The things that rows hold, as they are; their contents are looked for in any case."""

    def content(self, content: str, what: str) -> str:
        return content

    def word(self, held: Any) -> str:
        return held if isinstance(held, str) else _json(held)
