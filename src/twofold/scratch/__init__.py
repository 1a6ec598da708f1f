"""Factorized models that are trained from scratch: how they start, and the optimizer that keeps them stable."""
