"""Something to do around the import of a module, whoever imports it (PEP 451), so that importing Twofold need not import it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Around = Callable[[], AbstractContextManager[None]]


def on_import(module: str, around: Around) -> None:
    """Run a module within a context when it is imported; where it is already, just enter and leave the context."""
    if module in sys.modules:
        with around():
            pass
    else:
        sys.meta_path.insert(0, _Waiting(module, around))


class _Waiting:
    """Finds one module as all others are found, and gives its loader the context."""

    def __init__(self, module: str, around: Around) -> None:
        self._module, self._around = module, around

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._module:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                with self._around():
                    execute(module)

            loader.exec_module = exec_module
        return spec
