"""The formats of rows, one entry each: how a row is recognized, and how it becomes turns or text; docs/tune.md lists them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from twofold.task.text.row import BadRowError, Fields, Row, Turn, kind, parsed, truth, whole
from twofold.task.text.turns import check_turns, read_content, read_tools, read_turns, read_weight

ANSWERS = ("completion", "response", "answer", "output", "chosen")
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
QUESTIONS = ("instruction", "question", "query", "input")
UNWANTED = ("label", "kto_tag")  # false or 0: an answer as it shall not be
INDEX = re.compile(r"|Unnamed: \d+|__index_level_\d+__")  # columns that pandas adds


@dataclass(frozen=True)
class Format:
    """One format of rows."""

    name: str
    marks: tuple[tuple[str, ...], ...]  # a row of it has one field of each of these groups
    read: Callable[[Fields], Row]
    learnt: str  # in words
    examples: tuple[dict[str, Any], ...]  # docs/tune.md shows them, and the tests read them
    shaped: Callable[[Fields], bool] = lambda fields: True  # what else a row of it must look like

    def fits(self, fields: Fields) -> bool:
        """Say whether a row is of this format."""
        return all(fields.has(*group) for group in self.marks) and self.shaped(fields)


def read_row(value: Any, where: str, column: str = "text") -> Row:
    """Return a row of any format.

    Args:
        column: the field with the text, where it is none that the formats know.

    Raises:
        BadRowError: saying what is missing or wrong.
    """
    if not isinstance(value, dict):
        raise BadRowError(f"a row must be a JSON object, this is {kind(value)}")
    fields = Fields(value)
    if column != "text" and fields.has(column):
        row = Row("", completion=fields.text(column, empty=True))
    else:
        known = _format(fields, column)
        if known.read is not _text:  # of a text it is a class
            _check_wanted(fields)
        row = known.read(fields)
    return replace(row, where=where, unread=tuple(key for key in fields.unread if not INDEX.fullmatch(key)))


def _check_wanted(fields: Fields) -> None:
    for key in UNWANTED:
        wanted = truth(fields.values.get(key))
        if wanted is not None:
            fields.take(key)
        if wanted is False:
            raise BadRowError(f"its {key!r} is false, so its answer is one that is not to be learnt")


def is_row(value: Any) -> bool:
    """Say whether a JSON value is an object of one of the formats."""
    return isinstance(value, dict) and any(known.fits(Fields(value)) for known in FORMATS)


def _format(fields: Fields, column: str) -> Format:
    """Return the first format that fits, or else the first that fits in part: its reader says what is missing."""
    for fits in (Format.fits, lambda known, fields: fields.has(*known.marks[0]) and known.shaped(fields)):
        known = next((known for known in FORMATS if fits(known, fields)), None)
        if known is not None:
            return known
    keys = ", ".join(repr(str(key)[:40]) for key in list(fields.values)[:5]) or "nothing"
    text = "" if column == "text" else f", {column!r}"
    raise BadRowError(
        f'a row needs "messages", "prompt" with "completion", or "text"{text} (or the fields of another format that is read), '
        f"this one has {keys}"
    )


def _conversation(fields: Fields) -> Row:
    """Return turns as they stand."""
    key = fields.has("messages", "conversations", "conversation")
    assert key is not None
    turns = read_turns(fields.take(key), key)
    if turns[-1].role != "assistant" and fields.has("chosen"):
        turns += _answer("chosen", fields)
    return _whole_row(fields, turns)


def _preferred(fields: Fields) -> Row:
    """Return the whole conversation that is preferred."""
    if isinstance(fields.values["chosen"], str):
        raise BadRowError("'chosen' is a text and there is no 'prompt', so it can't be told what of it is the answer")
    return _whole_row(fields, _answer("chosen", fields))


def _exchanges(fields: Fields) -> Row:
    """Return a conversation whose items hold a question and its answer."""
    turns: list[Turn] = []
    for number, item in enumerate(fields.take("conversation", "conversations"), 1):
        try:
            if not isinstance(item, dict):
                raise BadRowError(f"it must be an object, it is {kind(item)}")
            own = Fields(item)
            question = own.text("human", "input", "user", empty=True) if own.has("human", "input", "user") else ""
            turns += [*_system(own), *([Turn("user", question)] if question else [])]
            answer, learnt = own.text("assistant", "output", "bot"), read_weight(own, "the answer")
            turns.append(Turn("assistant", answer, {key: own.values[key] for key in own.unread}, learnt))
        except BadRowError as error:
            raise BadRowError(f"in item {number} of the conversation {error}") from error
    return _whole_row(fields, turns)


def _of_exchanges(fields: Fields) -> bool:
    items = fields.values[fields.has("conversation", "conversations") or ""]
    first = items[0] if isinstance(items, list) and items else None
    return (
        isinstance(first, dict) and not {"role", "from"} & {*first} and bool({"assistant", "output", "bot"} & {*first})
    )


def _question(fields: Fields) -> Row:
    """Return a question, with what it is about after an empty line, and after another one its answer."""
    prompt = fields.text(*QUESTIONS)
    about = next((key for key in ("input", "context") if key in fields.unread), None)
    prompt = f"{prompt}\n\n{fields.text(about)}" if about else prompt
    return _exchange(fields, prompt, f"{prompt}\n\n")


def _prompt(fields: Fields) -> Row:
    """Return a prompt and its completion as they stand; either may be turns."""
    if not isinstance(fields.values["prompt"], list):
        prompt = fields.text("prompt", empty=True)
        return _exchange(fields, prompt, prompt)
    turns = read_turns(fields.take("prompt"), "prompt")
    return _whole_row(fields, _answered(turns, _answer(fields.has(*ANSWERS) or "completion", fields)))


def _exchange(fields: Fields, question: str, prompt: str) -> Row:
    """Return a prompt and its answer: as text, or as turns if the answer is turns or more belongs to it than a text can hold."""
    key = fields.has(*ANSWERS)
    beside = {*SYSTEM, "history", *TOOLS} & {*fields.unread}
    if key is not None and (beside or isinstance(fields.values[key], list | dict)):
        return _whole_row(fields, _answered([*_history(fields), Turn("user", question)], _answer(key, fields)))
    return Row("", prompt=prompt, completion=fields.text(*ANSWERS))


def _answered(before: list[Turn], answer: list[Turn]) -> list[Turn]:
    """Return a conversation of what was asked and the answer, which may hold what was asked once more."""
    if answer[0].role in ("assistant", "tool"):
        return [*before, *answer]
    if not {turn.content.strip() for turn in before} <= {turn.content.strip() for turn in answer}:
        raise BadRowError("its answer is a whole conversation that does not hold the prompt; leave one of the two out")
    return answer


def _answer(key: str, fields: Fields) -> list[Turn]:
    """Return the turns of an answer, which may be the words alone."""
    if isinstance(fields.values.get(key), list | dict):
        return read_turns(fields.take(key), key)
    return [Turn("assistant", fields.text(key))]


def _history(fields: Fields) -> list[Turn]:
    pairs = parsed(fields.take("history"), "history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadRowError("'history' must be a list of pairs, each a question and its answer")
    for side in chain.from_iterable(pairs):
        if not isinstance(side, str) or not side.strip():
            raise BadRowError(f"'history' must hold texts, one is {kind(side)}")
        whole(side, "history")
    return [Turn(role, side) for pair in pairs for role, side in zip(("user", "assistant"), pair, strict=True)]


def _system(fields: Fields) -> list[Turn]:
    content = read_content(fields.take(*SYSTEM), "'system'")
    return [Turn("system", content)] if content else []


def _whole_row(fields: Fields, turns: list[Turn]) -> Row:
    """Return a conversation with the system's words before it, and the tools."""
    system = _system(fields)
    if system and turns[0].role == "system":
        if turns[0].content != system[0].content:
            raise BadRowError("it has a 'system' and begins with another turn of the system; leave one of the two out")
        system = []
    tools = read_tools(fields.take(*TOOLS), "tools")
    return Row("", turns=check_turns([*system, *turns]), tools=tools)


def _text(fields: Fields) -> Row:
    return Row("", completion=fields.text("text", "content", empty=True))


ASKED, SAID = {"role": "user", "content": "How large?"}, {"role": "assistant", "content": "It is 7."}
HUMAN, GPT = {"from": "human", "value": "How large?"}, {"from": "gpt", "value": "It is 7."}
CALL = {"name": "area", "arguments": '{"side": 7}'}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]}
RETURNED = {"role": "tool", "tool_call_id": "c1", "content": "49"}
TOOL = {
    "type": "function",
    "function": {"name": "area", "parameters": {"type": "object", "properties": {"side": {"type": "number"}}}},
}
INPUT, OUTPUT, PROMPT = {"instruction": "Add.", "input": "2 and 2"}, {"output": "4"}, {"prompt": "2 + 2 = "}
LEARNT = "the turns of the assistant"

FORMATS = (  # a row is of the first that fits
    Format(
        "messages (OpenAI, TRL, Axolotl, Unsloth)",
        (("messages",),),
        _conversation,
        f"{LEARNT}, with their calls of tools, without those of `weight` 0",
        (
            {"messages": [ASKED, SAID]},
            {"messages": [ASKED, {**SAID, "weight": 0}, ASKED, {**SAID, "weight": 1}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "How large?"}]}, SAID]},
            {"messages": [ASKED, CALLED, RETURNED, SAID], "tools": [TOOL]},
        ),
    ),
    Format(
        "exchanges (Firefly, XTuner)",
        (("conversation", "conversations"),),
        _exchanges,
        "the answers",
        (
            {"conversation": [{"human": "How large?", "assistant": "It is 7."}]},
            {"conversation": [{"system": "Be brief.", "input": "How large?", "output": "It is 7."}]},
        ),
        _of_exchanges,
    ),
    Format(
        "ShareGPT (LLaMA-Factory, Axolotl)",
        (("conversations", "conversation"),),
        _conversation,
        LEARNT,
        (
            {"conversations": [HUMAN, GPT]},
            {"conversations": [HUMAN, GPT], "system": "Be brief."},
            {
                "conversations": [
                    HUMAN,
                    {"from": "function_call", "value": '{"name": "area", "arguments": {"side": 7}}'},
                    {"from": "observation", "value": "49"},
                    GPT,
                ],
                "tools": '[{"name": "area", "description": "The area of a square."}]',
            },
            {"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "No."}},
        ),
    ),
    Format(
        "Alpaca; also `response`, `answer` or `completion` for `output`, `context` for `input`",
        (("instruction",), ANSWERS),
        _question,
        "the output; with `system` or `history` it is a conversation",
        (
            {"instruction": "Add 2 and 2.", **OUTPUT},
            {**INPUT, **OUTPUT},
            {**INPUT, **OUTPUT, "system": "Be brief.", "history": [["Hello", "Yes?"]]},
        ),
    ),
    Format(
        "a prompt and its completion (TRL, OpenAI); also `response`, `answer`, `output`",
        (("prompt",), ANSWERS),
        _prompt,
        "the completion, as it stands after the prompt",
        (
            {**PROMPT, "completion": "4"},
            {"prompt": [ASKED], "completion": [SAID]},
            {**PROMPT, "answer": "4"},
            {**PROMPT, "chosen": "4", "rejected": "5"},
        ),
    ),
    Format(
        "a question and its answer; also `query`, `response`, `context`",
        (("question", "query"), ANSWERS),
        _question,
        "the answer, after an empty line",
        ({"question": "2 + 2?", "answer": "4"}, {"system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"}),
    ),
    Format("input and output", (("input",), ANSWERS), _question, "the output", ({"input": "2 + 2?", "output": "4"},)),
    Format(
        "preferences of whole conversations (TRL)",
        (("chosen",), ("rejected",)),
        _preferred,
        f"{LEARNT} in `chosen`",
        ({"chosen": [ASKED, SAID], "rejected": [ASKED, {**SAID, "content": "No."}]},),
    ),
    Format("text", (("text",),), _text, "all of it", ({"text": "A text."},)),
    Format("content", (("content",),), _text, "all of it", ({"content": "A text."},)),
)
