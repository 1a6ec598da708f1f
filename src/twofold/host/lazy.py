"""Names that are loaded when they are first asked for (PEP 562), so that a package costs no more than what is used of it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazily(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and the ``__dir__`` of a package.

    Its public names are those that its ``__init__`` imports for type checkers, below ``if TYPE_CHECKING:``.
    """
    module = sys.modules[package]
    source = module.__loader__.get_source(package)  # type: ignore[union-attr]
    places = {
        alias.asname or alias.name: (str(statement.module), alias.name)
        for block in ast.parse(source).body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        place, original = places[name]
        value = getattr(import_module(place), original)
        setattr(module, name, value)
        return value

    return load, lambda: sorted({*vars(module), *places})
