"""What settings are: small pydantic models, one for each stage, that the recipe of a run is composed of.

A sentence about a setting names it between backticks, with its value behind an equals sign: `` `keep=0.8` ``. The command line
turns that into the flag, ``--keep 0.8``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import ClassVar, TypeVar

import pydantic
import yaml

from twofold.errors import TwofoldError

S = TypeVar("S", bound=pydantic.BaseModel)


class Settings(pydantic.BaseModel, extra="forbid", defer_build=True):
    """The settings of one stage. The description of a field is also the help of its flag."""

    TITLE: ClassVar[str] = "More"  # of the panel that holds their flags

    def chosen(self, name: str) -> bool:
        """Say whether a setting was given, and is not what it would be without."""
        field = type(self).model_fields.get(name)
        return field is not None and name in self.model_fields_set and getattr(self, name) != field.default

    def part(self, kind: type[S]) -> S:
        """Return the settings of one kind that stand among these; what is missing has its default."""
        if isinstance(self, kind):
            return self
        shared = kind.model_fields.keys() & type(self).model_fields
        return kind.model_construct(**{name: getattr(self, name) for name in shared})


def validated(model: type[S], settings: dict[str, object], names: Iterable[str]) -> S:
    """Return settings as a pydantic model of them.

    Args:
        names: all settings that exist.

    Raises:
        TwofoldError: naming the first setting that is wrong, what it must be, and what came.
    """
    try:
        return model.model_validate(settings)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(part for part in first["loc"] if isinstance(part, str))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("extra_forbidden", "invalid_key"):
            unknown = ".".join(map(str, first["loc"]))
            raise TwofoldError(f"there is no setting {unknown!r}; the settings are {', '.join(names)}") from error
        if not setting:
            raise TwofoldError(message) from error
        if setting.startswith("overrides"):
            pattern = setting.partition(".")[2]
            setting = f"override={pattern}" if pattern else "override"
        if first["type"] == "missing":
            raise TwofoldError(f"`{setting}` is missing; give it, or put it into a recipe") from error
        brief = reprlib.Repr()  # a few lines of YAML can stand for more than any memory holds
        brief.maxlevel, brief.maxstring = 2, 80
        value = brief.repr(first["input"])
        raise TwofoldError(f"`{setting}`: {message[0].lower()}{message[1:]}, got {value}") from error


def from_call(kind: type[S], make: Callable[[dict[str, object]], S], first: object, more: Mapping[str, object]) -> S:
    """Return the settings of a call from Python.

    Args:
        first: the settings themselves, a mapping of them, or the name of the model.
        more: settings that the call names.

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
    """Return paths as strings."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def read_settings(path: Path) -> dict[str, object]:
    """Read a YAML recipe; flags may still override its settings.

    Raises:
        TwofoldError: if the file is missing or holds no mapping.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TwofoldError(f"the recipe {path} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also an impossible date or number, or deep nesting
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise TwofoldError(f"the recipe {path} is not YAML: {where}{reason}") from error
    if not isinstance(settings, dict):
        raise TwofoldError(f"the recipe {path} holds no settings; write one as in: keep: 0.8")
    if settings.get("trust_remote_code"):
        raise TwofoldError(
            f"the recipe {path} asks to run a checkpoint's code; take that out, and give `trust_remote_code` if you trust it"
        )
    return settings


def as_list(value: object) -> object:
    """Return a single name as a list."""
    return [value] if isinstance(value, str) else value


def split_names(value: object) -> object:
    """Split names at commas."""
    items = as_list(value)
    if not isinstance(items, list):
        return items
    return [name for item in items for name in (item.split(",") if isinstance(item, str) else [item]) if name]
