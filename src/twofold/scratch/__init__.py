"""Factorized models that are trained from scratch: how they start, and the optimizer that keeps them stable."""

from twofold.scratch.optimizer import training_optimizer
from twofold.scratch.start import STARTS, factorize_start

__all__ = ["STARTS", "factorize_start", "training_optimizer"]
