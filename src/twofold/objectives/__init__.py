"""The objectives by name, one file each: (weight, moments) → the metrics on either side."""

from importlib import import_module
from pkgutil import iter_modules

from twofold.objectives.base import OBJECTIVES, LayerMoments, Objective, Problem, get_objective, objective

for _module in iter_modules(__path__):
    if _module.name != "base":
        import_module(f"{__name__}.{_module.name}")

__all__ = ["OBJECTIVES", "LayerMoments", "Objective", "Problem", "get_objective", "objective"]
