"""The arena: many factorizations of one model, on one calibration, measured side by side with the dense model."""

from twofold.compare.arena import compare
from twofold.compare.grid import Grid, make_grid
from twofold.compare.record import Comparison, Row

__all__ = ["Comparison", "Grid", "Row", "compare", "make_grid"]
