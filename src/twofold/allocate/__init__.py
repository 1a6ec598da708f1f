"""Allocations by name, one file each: (spectra, budget) → a rank for every target."""

from importlib import import_module
from pkgutil import iter_modules

from twofold.allocate.base import ALLOCATIONS, Allocation, Candidate, Choice, allocation, get_allocation
from twofold.inference.latency import LayerTimes
from twofold.planning.evidence.base import Evidence

for _module in iter_modules(__path__):
    if _module.name != "base":
        import_module(f"{__name__}.{_module.name}")

__all__ = ["ALLOCATIONS", "Allocation", "Candidate", "Choice", "Evidence", "LayerTimes", "allocation", "get_allocation"]
