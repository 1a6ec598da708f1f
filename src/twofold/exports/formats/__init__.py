"""The formats, one file each: (source, folder) → what was written. A file that is put here is found by itself."""

from importlib import import_module
from pkgutil import iter_modules


def register() -> None:
    """Register every format; none of their packages is loaded before one is written."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
