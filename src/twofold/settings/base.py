"""What settings are: small pydantic models, one for each stage, that the recipe of a run is composed of.

A sentence about a setting names it between backticks, with its value behind an equals sign: `` `keep=0.8` ``. The command line
turns that into the flag, ``--keep 0.8``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import ClassVar, TypeVar

import pydantic

from twofold.errors import TwofoldError

S = TypeVar("S", bound=pydantic.BaseModel)


class Settings(pydantic.BaseModel, extra="forbid", defer_build=True):
    """The settings of one stage. The description of a field is also the help of its flag."""

    TITLE: ClassVar[str] = "More"  # of the panel of flags that they stand in

    def part(self, kind: type[S]) -> S:
        """Return the settings of one kind that stand among these; those that do not have their defaults."""
        if isinstance(self, kind):
            return self
        there = {name: getattr(self, name) for name in kind.model_fields if name in type(self).model_fields}
        return kind.model_construct(**there)


def checked(model: type[S], settings: dict[str, object], names: Iterable[str]) -> S:
    """Return settings as a pydantic model of them.

    Args:
        names: of all the settings that there are.

    Raises:
        TwofoldError: naming the first setting that is wrong, what it must be, and what came.
    """
    try:
        return model.model_validate(settings)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(part for part in first["loc"] if isinstance(part, str))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("extra_forbidden", "invalid_key"):
            unknown = ".".join(map(str, first["loc"]))
            raise TwofoldError(f"there is no setting {unknown!r}; the settings are {', '.join(names)}") from error
        if not where:
            raise TwofoldError(message) from error
        setting = where
        if where.startswith("overrides"):
            pattern = where.partition(".")[2]
            setting = f"override={pattern}" if pattern else "override"
        if first["type"] == "missing":
            raise TwofoldError(f"`{setting}` is missing; give it, or put it into a recipe") from error
        raise TwofoldError(f"`{setting}`: {message[0].lower()}{message[1:]}, got {_short(first['input'])}") from error


def given(kind: type[S], make: Callable[[dict[str, object]], S], first: object, more: Mapping[str, object]) -> S:
    """Return settings as a call from Python gives them.

    Args:
        first: the settings themselves, a mapping of them, or the name of the model.
        more: those that are named in the call.

    Raises:
        TwofoldError: if one is wrong.
    """
    if isinstance(first, kind):
        if more:
            raise TwofoldError(f"the settings are given as a whole, and {', '.join(more)} beside them; give either")
        return first
    known = dict(first) if isinstance(first, Mapping) else {"model": str(first)}
    return make({**known, **{name: _plain(value) for name, value in more.items()}})


def _plain(value: object) -> object:
    """Return paths as the names that they are."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, PurePath) else value


def _short(value: object) -> str:
    """Return a value in some words: a few lines of YAML can stand for more than any memory holds."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring = 2, 80
    return brief.repr(value)


def as_list(value: object) -> object:
    """Return one name as a list of it."""
    return [value] if isinstance(value, str) else value


def split_names(value: object) -> object:
    """Return names between commas as several."""
    several = as_list(value)
    if not isinstance(several, list):
        return several
    return [name for one in several for name in (one.split(",") if isinstance(one, str) else [one]) if name]
