"""Integers of a few bits in the place of floating point: rounded, measured, chosen together with ranks, and carried out."""
