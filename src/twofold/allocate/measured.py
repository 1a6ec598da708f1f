"""Global, on second-order losses that are measured token by token and not taken from the spectrum.

The spectrum says what a rank loses if a layer's inputs and gradients are independent of one another. Here that is not assumed:
the loss of a rank is ½ E[(gᵀ ΔW x)²] over tokens, with the same components in the same order. Few tokens may make a larger rank
seem to lose more; it counts as much as the next smaller one then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from twofold.allocate import Candidate, Choice, Measured, allocation
from twofold.allocate.global_ import lagrangian


def _measure(measurement: Any) -> Measured:  # (k + 1,) of each weight, by rank from 0 on
    from twofold.evidence.second_order import rank_losses

    return rank_losses(measurement)


@allocation("measured", needs={"next token", "whole model"}, measure=_measure, seconds=lambda price, _: price.sweep)
def measured(candidates: list[Candidate], budget: float) -> list[Choice]:
    return lagrangian([_with_curve(candidate) for candidate in candidates], budget)


def _with_curve(candidate: Candidate) -> Candidate:
    import numpy as np

    assert candidate.measured is not None
    return replace(candidate, losses=np.minimum.accumulate(candidate.measured)[candidate.ranks])
