"""The form that a factored model runs fastest in: ``optimize``."""

from twofold.inference.form import Optimized, optimize

__all__ = ["Optimized", "optimize"]
