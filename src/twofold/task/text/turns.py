"""The turns of a conversation as fine-tuning tools write them: names of roles, contents in parts, calls of tools, weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from twofold.task.text.row import BadRowError, Fields, Turn, kind, parsed, parsed_if, truth, whole

ROLES = {  # by their names in lower case
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
}
CALLS = ("function_call", "tool_call")  # roles whose content is a call
HOLD = ("content", "value", "tool_calls", "function_call")  # a turn has one of them
WEIGHTS = ("weight", "train", "training", "loss", "output_with_loss")  # 0 or false: the turn is not learnt
TEXTS = ("text", "input_text", "output_text")  # types of parts that are text


def read_turns(value: Any, key: str) -> list[Turn]:
    """Return the turns of a list.

    Raises:
        BadRowError: if it is no list, or a turn can't be read.
    """
    value = parsed(value, key)
    if isinstance(value, dict) and value and all(isinstance(held, list) for held in value.values()):
        value = [
            dict(zip(value, held, strict=False)) for held in zip(*value.values(), strict=False)
        ]  # a column of each field
    elif isinstance(value, dict):  # one turn, as the answers of preferences are written
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{key!r} must be a list of turns, it is {kind(value)}")
    return [_turn(turn, f"turn {number} of {key!r}") for number, turn in enumerate(value, 1)]


def _turn(value: Any, what: str) -> Turn:
    if not isinstance(value, dict):
        raise BadRowError(f"{what} must be an object, it is {kind(value)}")
    fields = Fields(value)
    named = fields.take("role", "from")
    if not isinstance(named, str) or not named:
        raise BadRowError(f'{what} has no "role"')
    role = ROLES.get(named.lower())
    if role is None:
        raise BadRowError(f"{what} has the role {named[:40]!r}, which is none of {', '.join(ROLES)}")
    what = f"{what} ({role})"
    content = read_content(fields.take("content", "value"), what)
    learnt = read_weight(fields, what)
    calls = _calls(fields, what)
    if named.lower() in CALLS and content and not calls:
        content, calls = _call_of_text(content, what)
    if calls and role != "assistant":
        raise BadRowError(f"{what} calls a tool, which is for the assistant alone")
    if not calls and (content is None or (role == "assistant" and not content.strip())):
        raise BadRowError(f'{what} has no "content"')
    more = {key: fields.values[key] for key in fields.unread}
    _whole_of(more, what)
    return Turn(role, content or "", {**more, **({"tool_calls": calls} if calls else {})}, learnt)


def read_content(value: Any, what: str) -> str | None:
    """Return the content of a turn as one text; None if there is none.

    Raises:
        BadRowError: if it is no text, or has parts that are none.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return whole(value, what)
    if not isinstance(value, list):
        raise BadRowError(f"the content of {what} must be a text, it is {kind(value)}")
    return "".join(_part(part, what) for part in value)


def _part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return whole(part, what)
    if not isinstance(part, dict):
        raise BadRowError(f"the content of {what} has a part that must be a text, it is {kind(part)}")
    of = part.get("type", "text")
    if of not in TEXTS or "text" not in part:
        raise BadRowError(f"the content of {what} has a part of type {str(of)[:40]!r}; only text is read")
    if not isinstance(part["text"], str):
        raise BadRowError(f"the content of {what} has a part whose 'text' must be a text, it is {kind(part['text'])}")
    return whole(part["text"], what)


def read_weight(fields: Fields, what: str) -> bool:
    """Say whether a turn is learnt, by its weight.

    Raises:
        BadRowError: if it is neither 0 nor 1.
    """
    learnt = True
    for key in WEIGHTS:
        weight = fields.take(key)
        if weight is not None and truth(weight) is None:
            raise BadRowError(f"the {key!r} of {what} must be 0 or 1, it is {str(weight)[:40]}")
        learnt = learnt and (weight is None or truth(weight) is True)
    return learnt


def _calls(fields: Fields, what: str) -> list[dict[str, Any]]:
    """Return the calls of tools of a turn, each with its arguments as an object."""
    calls = parsed(fields.take("tool_calls"), "tool_calls") or []
    older = parsed(fields.take("function_call"), "function_call")
    if not isinstance(calls, list):
        raise BadRowError(f"'tool_calls' of {what} must be a list, it is {kind(calls)}")
    return [_call(call, what) for call in [*calls, *([older] if older else [])]]


def _call(call: Any, what: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRowError(f"a call of {what} has no name of a function")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = parsed(arguments, "arguments")  # OpenAI writes them as a text; templates take an object
    if not isinstance(arguments, dict | None):
        raise BadRowError(f"the arguments of a call of {what} must be an object, they are {kind(arguments)}")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    _whole_of(made, what)
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _call_of_text(content: str, what: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the content and the calls of a turn that is a call: what is no JSON of one is learnt as it stands."""
    value = parsed_if(content, lambda held: _are(held, lambda call: "name" in call or "function" in call))
    if isinstance(value, str):
        return content, []
    return "", [_call(call, what) for call in (value if isinstance(value, list) else [value])]


def are_turns(value: Any) -> bool:
    """Say whether a value is a turn or a list of them: objects with a role that is known, and a content or a call."""

    def is_turn(item: dict[str, Any]) -> bool:
        role = item.get("role", item.get("from"))
        return isinstance(role, str) and role.lower() in ROLES and bool({*HOLD} & {*item})

    return _are(value, is_turn)


def _are(value: Any, fits: Callable[[dict[str, Any]], bool]) -> bool:
    """Say whether a value is an object of some shape, or a list of such."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, dict) and fits(item) for item in items)


def read_tools(value: Any, key: str) -> tuple[dict[str, Any], ...]:
    """Return the tools that the assistant may call, as templates take them.

    Raises:
        BadRowError: if they are no list of descriptions.
    """
    tools = parsed(value, key) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError(f"{key!r} must be a list of objects, it is {kind(tools)}")
    _whole_of(tools, key)
    return tuple(
        tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool} for tool in tools
    )


def _whole_of(value: Mapping[str, Any] | list[Any], what: str) -> None:
    whole(json.dumps(value, ensure_ascii=False, default=str), what)


def check_turns(turns: list[Turn]) -> tuple[Turn, ...]:
    """Return the turns of a conversation that has an answer to learn.

    Raises:
        BadRowError: if the assistant has no turn, none that is learnt, or not the last word.
    """
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise BadRowError("it has no turn of the assistant, so there is no answer to learn")
    if not any(turn.learnt for turn in answers):
        raise BadRowError("each turn of the assistant has the weight 0, so there is no answer to learn")
    if turns[-1].role in ("user", "system"):
        raise BadRowError(f"it ends with a turn of the {turns[-1].role}, which has no answer")
    return tuple(turns)
