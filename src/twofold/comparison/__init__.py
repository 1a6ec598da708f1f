"""The arena: many factorizations of one model, on one calibration, measured side by side with the dense model."""

from twofold.comparison.arena import compare
from twofold.comparison.grid import Grid, make_grid
from twofold.comparison.record import Comparison, Row

__all__ = ["Comparison", "Grid", "Row", "compare", "make_grid"]
