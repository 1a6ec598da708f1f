"""Weights whose sizes are chosen together: what makes a hidden unit or a dimension of a head, and what reads it."""
