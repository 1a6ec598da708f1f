"""The refinements by name, one file each: they train what the closed form has made, on the same calibration tokens."""

from importlib import import_module
from pkgutil import iter_modules

from twofold.refine.base import REFINEMENTS, Refined, Refinement, Task, get_refinement, refinement

for _module in iter_modules(__path__):
    if _module.name not in ("base", "gradient", "kept", "likeness", "series", "streams", "teacher", "training"):
        import_module(f"{__name__}.{_module.name}")

from twofold.refine.series import refine
from twofold.run.check import check_refinable, check_refinements

__all__ = [
    "REFINEMENTS",
    "Refined",
    "Refinement",
    "Task",
    "check_refinable",
    "check_refinements",
    "get_refinement",
    "refine",
    "refinement",
]
