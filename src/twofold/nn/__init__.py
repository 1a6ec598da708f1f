"""The factored layers."""

from twofold.nn.factored_linear import FactoredLinear

__all__ = ["FactoredLinear"]
