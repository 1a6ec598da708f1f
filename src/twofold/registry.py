"""Methods by name: one registry for each kind of method, one file for each method.

A file that is put into the folder of a kind is found by its name: ``two_sided.py`` holds ``two-sided``, ``global_.py`` holds
``global``. Files whose names begin with ``_``, and folders, hold none. A method of another package is known once the module that
registers it has been imported. The names alone cost no import.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Generic, TypeVar

from twofold.errors import TwofoldError

T = TypeVar("T")


class Registry(Generic[T]):
    """The methods of one kind.

    Args:
        kind: what they are, for messages: "objective".
        package: the folder that holds them.
        others: what else may be named, in words: families whose members have names but no files of their own.
    """

    def __init__(self, kind: str, package: str, others: str = "") -> None:
        self.kind, self.package, self.others = kind, package, others
        self._methods: dict[str, T] = {}
        self._families: list[Callable[[str], T | None]] = []

    def add(self, name: str, method: T) -> T:
        """Register a method under its name; the last one of a name counts."""
        self._methods[name] = method
        return method

    def family(self, find: Callable[[str], T | None]) -> Callable[[str], T | None]:
        """Register a function from names to methods; it returns None for a name that is not of its family."""
        self._families.append(find)
        return find

    def names(self) -> list[str]:
        """Return the names of all methods, in alphabetical order."""
        return sorted({*self._files, *self._methods})

    def all(self) -> list[T]:
        """Return all methods, in the order of their names."""
        return [self.get(name) for name in self.names()]

    def get(self, name: str) -> T:
        """Return the method of a name.

        Raises:
            TwofoldError: if there is none; it lists those that there are.
        """
        files = self._files
        if name not in self._methods and name in files:
            import_module(f"{self.package}.{files[name]}")
        if name in self._methods:
            return self._methods[name]
        for module in self._modules:
            if module.startswith("_"):
                import_module(f"{self.package}.{module}")
        for find in self._families:
            method = find(name)
            if method is not None:
                return method
        others = f", or {self.others}" if self.others else ""
        raise TwofoldError(f"there is no {self.kind} {name[:80]!r}; choose one of {', '.join(self.names())}{others}")

    @cached_property
    def _files(self) -> dict[str, str]:
        """Map the names of methods to those of their files."""
        return {m.rstrip("_").replace("_", "-"): m for m in self._modules if not m.startswith("_")}

    @cached_property
    def _modules(self) -> list[str]:
        spec = find_spec(self.package)
        places = spec.submodule_search_locations if spec is not None else None
        return [module.name for module in iter_modules(places) if not module.ispkg]
