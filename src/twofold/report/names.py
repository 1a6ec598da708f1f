"""What models and texts are called in public: no folder of the machine is told."""

from __future__ import annotations

import re
from pathlib import Path

from twofold.model.builtin import ALIAS
from twofold.recipe import Recipe

ALIAS_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALIAS_LICENSE = "apache-2.0"
FILES = {".txt", ".raw", ".md", ".json", ".jsonl", ".gguf", ".parquet", ".csv", ".safetensors"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|[a-z0-9][a-z0-9.-]*")  # org/name, or an old bare name: gpt2
PATHS = re.compile(r"(?<![^\s'\"(\[,=:])(?:[A-Za-z]:|~|\.{1,2})?(?:[\\/]+[^\\/\s,;'\"]+)+")


def is_path(value: str) -> bool:
    """Say whether a model or a text is named by a place on this machine."""
    if value == ALIAS:
        return False
    if value.startswith((".", "/", "~")) or "\\" in value or value.count("/") > 1 or re.match(r"[A-Za-z]:", value):
        return True
    try:
        return Path(value).suffix.lower() in FILES or Path(value).exists()
    except (OSError, ValueError):
        return True


def last_part(value: str) -> str:
    """Return the last component of a path."""
    return re.split(r"[\\/]+", value.rstrip("\\/"))[-1] or "model"


def public_name(value: str) -> str:
    """Return the name of a model or text with the folders of this machine left out."""
    return last_part(value) if is_path(value) else value


def model_title(model: str) -> str:
    """Return what the model is called in a title."""
    return last_part(ALIAS_BASE) if model == ALIAS else public_name(model)


def base_model(model: str) -> str | None:
    """Return the hub id that a model was loaded from; None if it has none."""
    if model == ALIAS:
        return ALIAS_BASE
    return model if not is_path(model) and HUB_ID.fullmatch(model) else None


def without_paths(text: str) -> str:
    """Replace each path in some words by its last component.

    >>> without_paths("held-out /home/me/texts/wiki.txt")
    'held-out wiki.txt'
    """
    return PATHS.sub(lambda path: last_part(path[0]), text)


def public_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with every path shortened to its last component."""
    return recipe.model_copy(
        update={
            "model": public_name(recipe.model),
            "calibration": [public_name(text) for text in recipe.calibration],
            "eval_text": None if recipe.eval_text is None else last_part(recipe.eval_text),
        }
    )
