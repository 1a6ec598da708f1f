"""The recipe's fields as flags: made from the one pydantic model, so that they can't drift apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from twofold.cli.words import with_flags
from twofold.comparison.grid import grid_fields, make_grid
from twofold.errors import TwofoldError
from twofold.model.settings import parse_override
from twofold.planning.settings import SIZES
from twofold.recipe import Recipe, make_recipe
from twofold.settings.file import read_settings
from twofold.tuning.settings import TuneSettings, make_settings


def recipe_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each field of the recipe, and --recipe; the function gets ``recipe`` in their place.

    A flag that is not given leaves the value of the YAML file, or else the default.
    """
    return _flags(function, "recipe", make_recipe, Recipe.model_fields)


def grid_flags(function: Callable[..., None]) -> Callable[..., None]:
    """The same for a grid of recipes; the function gets ``grid``."""
    return _flags(function, "grid", make_grid, grid_fields())


def tune_flags(function: Callable[..., None]) -> Callable[..., None]:
    """The same for a fine-tuning; the function gets ``settings``."""
    return _flags(function, "settings", make_settings, TuneSettings.model_fields)


def _flags(
    function: Callable[..., None],
    first: str,  # the parameter that gets what is made of the settings
    make: Callable[[dict[str, object]], object],
    fields: Mapping[str, FieldInfo],
) -> Callable[..., None]:
    own = inspect.signature(function).parameters
    hints = get_type_hints(function, include_extras=True)
    annotations: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []

    def add(name: str, annotation: Any, default: Any) -> None:
        annotations[name] = annotation
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))

    add("model", Annotated[str | None, typer.Argument(help=Recipe.model_fields["model"].description)], None)
    for name, field in fields.items():
        if name == "model":
            continue
        flag = "--override" if name == "overrides" else "--" + name.replace("_", "-")
        shown = (
            ""
            if field.is_required() or field.default in (None, [], {}, [[]])
            else f"[default: {_plain(field.default)}]"
        )
        description = with_flags(f"{field.description} {shown}").strip().replace("[", "\\[")
        option = typer.Option(flag, help=description, show_default=False)
        if field.annotation is bool:
            add(name, Annotated[bool, option], False)
        else:
            add(name, Annotated[_flag_type(field.annotation), option], None)
    recipe_help = "A YAML file with any of these settings; flags come first."
    add("recipe", Annotated[Path | None, typer.Option("--recipe", help=recipe_help)], None)
    for parameter in own.values():
        if parameter.name != first:
            add(parameter.name, hints[parameter.name], parameter.default)

    def command(**given: Any) -> None:
        rest = {name: given.pop(name) for name in own if name != first}
        file = given.pop("recipe")
        settings = read_settings(file) if file is not None else {}
        for name, value in given.items():
            if value is None or value is False or value == []:
                continue
            if name == "overrides":
                settings[name] = dict(parse_override(text) for text in value)
            else:
                settings[name] = value
        if any(given.get(name) not in (None, []) for name in SIZES):  # then the file's size is put aside
            for name in SIZES:
                settings.pop(name, None) if given.get(name) in (None, []) else None
        if not settings.get("model"):
            raise TwofoldError("name a model: a folder, a hub id, a .gguf file, or smollm2")
        function(**{first: make(settings)}, **rest)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = annotations
    command.__doc__ = function.__doc__
    return command


SEVERAL = (  # flags that may take several values
    "--calibration", "--text", "--include", "--exclude", "--override", "--objectives", "--other-text", "--baselines", "--data"
)  # fmt: skip


def repeat_flags(arguments: list[str]) -> list[str]:
    """Let a flag take several values, as a shell gives for ``--calibration texts/*.txt``: repeat the flag before each.

    >>> repeat_flags(["compress", "m", "--calibration", "a.txt", "b.txt", "--keep", "0.8"])
    ['compress', 'm', '--calibration', 'a.txt', '--calibration', 'b.txt', '--keep', '0.8']

    Only where the model stands before the flags, or in a recipe; else the last value could be the model.
    """
    if len(arguments) < 2 or (arguments[1].startswith("-") and "--recipe" not in arguments):
        return arguments
    spread = arguments[:1]
    flag: str | None = None
    values = 0
    for argument in arguments[1:]:
        if argument.startswith("-") and argument != "-":
            flag, values = (argument if argument in SEVERAL else None), 0
        elif flag is not None:
            values += 1
            if values > 1:
                spread.append(flag)
        spread.append(argument)
    return spread


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flag_type(annotation: Any) -> Any:
    """The type of a flag for the type of a field; each may be left out. Pydantic checks the values."""
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) in (list, dict):
        return list[str] | None
    inner = arguments[0] if arguments else annotation
    if get_origin(inner) in (list, dict):
        return list[str] | None
    return (inner if inner in (int, float, str) else str) | None
