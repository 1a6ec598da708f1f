"""The form that a factored model runs fastest in: ``optimize``."""

from twofold.inference.optimize import Optimized, optimize

__all__ = ["Optimized", "optimize"]
