"""Settings as flags: made from the pydantic models of the settings, so that they can't drift apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel

from twofold.cli.words import with_flags
from twofold.errors import TwofoldError
from twofold.model.place import find_model
from twofold.model.settings import parse_override
from twofold.planning.settings import SIZES
from twofold.recipe.effort import PARTS
from twofold.settings.base import read_settings

MOST_USED = (
    "keep",
    "budget",
    "calibration",
    "effort",
    "refine",
    "data",
    "method",
    "out",
)  # in the first panel, that of --help
PANELS = ("Size", "Calibration", "Rows", "Method", "Refinement", "Storage", "Weights", "Measuring", "Model and machine")


def settings_flags(
    make: Callable[[dict[str, object]], object], *kinds: type[BaseModel], names: Iterable[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each field of some settings, and --recipe; its first parameter gets what is made of them.

    A flag that is not given leaves the value of the YAML file, or else the default.

    Args:
        kinds: the settings; of two fields of one name the first counts.
        names: of the fields, in the order of the help; by default all.
    """
    fields = {name: field for kind in reversed(kinds) for name, field in kind.model_fields.items()}
    panels = {name: _panel(name, kinds) for name in (fields if names is None else names) if name != "model"}
    order = [*MOST_USED, *PANELS, *panels.values()]
    ordered = sorted(panels, key=lambda name: order.index(name if panels[name] is None else panels[name]))

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        first, *own = inspect.signature(function).parameters.values()
        hints = get_type_hints(function, include_extras=True)
        recipe_help = "A YAML file with any of these settings; flags come first."
        recipe = typer.Option("--recipe", help=recipe_help, rich_help_panel="Run")
        flags = [
            _flag("model", Annotated[str | None, typer.Argument(help=fields["model"].description)], None),
            *(_field_flag(name, fields[name], panels[name]) for name in ordered),
            _flag("recipe", Annotated[Path | None, recipe], None),
            *(_own_flag(parameter, hints[parameter.name]) for parameter in own),
        ]

        def command(**values: Any) -> None:
            rest = {parameter.name: values.pop(parameter.name) for parameter in own}
            function(**{first.name: make(_settings(values))}, **rest)

        command.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
        command.__annotations__ = {flag.name: flag.annotation for flag in flags}
        command.__doc__ = function.__doc__
        return command

    return decorate


def _settings(given: dict[str, Any]) -> dict[str, object]:
    """Put flags over what a YAML file says."""
    file = given.pop("recipe")
    settings = read_settings(file) if file is not None else {}
    flags = {name: value for name, value in given.items() if value is not None and value is not False and value != []}
    if "overrides" in flags:
        flags["overrides"] = dict(parse_override(text) for text in flags["overrides"])
    if flags.keys() & set(SIZES):  # then the file's size is put aside
        settings = {name: value for name, value in settings.items() if name not in SIZES}
    if "effort" in flags:  # then what an earlier effort stood for is
        settings = {name: value for name, value in settings.items() if name not in PARTS}
    settings |= flags
    if not settings.get("model"):
        raise TwofoldError("name a model: a folder, a hub id, a .gguf file, or smollm2")
    model, revision = settings["model"], settings.get("revision")
    if "model" not in flags and isinstance(model, str):  # what else stands in the file is refused by the settings
        find_model(model, revision if isinstance(revision, str) else None)
    return settings


def _panel(name: str, kinds: Iterable[type[BaseModel]]) -> str | None:
    """Return the title of the settings that a field stands in."""
    if name in MOST_USED:
        return None
    owner = next(part for kind in kinds for part in kind.__mro__ if name in inspect.get_annotations(part))
    return str(getattr(owner, "TITLE", "Run"))


def _flag(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _own_flag(parameter: inspect.Parameter, hint: Any) -> inspect.Parameter:
    """Put a flag of the command itself into the panel of the run."""
    if parameter.name not in MOST_USED:
        kind, option = get_args(hint)
        option = copy(option)
        option.rich_help_panel = "Run"
        hint = Annotated[kind, option]
    return _flag(parameter.name, hint, parameter.default)


def _field_flag(name: str, field: Any, panel: str | None) -> inspect.Parameter:
    """Return the flag of a field."""
    flag = "--override" if name == "overrides" else "--" + name.replace("_", "-")
    default = " ".join(map(str, field.default)) if isinstance(field.default, list) else field.default
    unsaid = field.is_required() or field.default in (None, [], {}, [[]])
    shown = "" if unsaid else f"[default: {default}]"
    words = with_flags(f"{field.description} {shown}").strip().replace("[", "\\[")
    choices = _completion(field.annotation)
    option = typer.Option(flag, help=words, show_default=False, rich_help_panel=panel, autocompletion=choices)
    if field.annotation is bool:
        return _flag(name, Annotated[bool, option], False)
    return _flag(name, Annotated[_flag_type(field.annotation), option], None)


def _completion(annotation: Any) -> Callable[[str], list[str]] | None:
    """Return what a shell completes the value of a field with, where there is a choice of words."""
    kinds = [annotation, *get_args(annotation)]
    words = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
    return None if words is None else lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _flag_type(annotation: Any) -> Any:
    """Return the type of a flag for the type of a field; each may be left out. Pydantic checks the values."""
    inner = next((a for a in get_args(annotation) if a is not type(None)), annotation)
    if {get_origin(annotation), get_origin(inner)} & {list, dict}:
        return list[str] | None
    return (inner if inner in (int, float, str) else str) | None
