"""What runs a model, by name, one file each: load a model or an exported folder, then read a prompt and write tokens."""

from importlib import import_module
from pkgutil import iter_modules

from twofold.speed.runtimes.base import RUNTIMES, Runtime, Session, Settings, State, get_runtime, register

for _module in iter_modules(__path__):
    if _module.name != "base":
        import_module(f"{__name__}.{_module.name}")

__all__ = ["RUNTIMES", "Runtime", "Session", "Settings", "State", "get_runtime", "register"]
