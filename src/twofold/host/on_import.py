"""A context around the import of a module, whoever imports it (PEP 451), so that importing Twofold need not import it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Around = Callable[[], AbstractContextManager[None]]


def on_import(module: str, around: Around) -> None:
    """Run a module within a context when it is imported; if it is already, just enter and leave the context."""
    if module in sys.modules:
        with around():
            pass
    else:
        sys.meta_path.insert(0, _Waiting(module, around))


@dataclass(frozen=True)
class _Waiting:
    """Finds one module as all others are found, and gives its loader the context."""

    module: str
    around: Around

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                with self.around():
                    execute(module)

            loader.exec_module = exec_module
        return spec
