"""A whole weight in integers with a correction of low rank, by the methods of objectives/corrections.py."""

from __future__ import annotations

import torch
from torch import Tensor

from twofold.linalg import damp
from twofold.nn import CorrectedLinear, IntLinear
from twofold.objectives import LayerMoments
from twofold.objectives.base import Correct
from twofold.plan import PlanEntry
from twofold.quantize.rounding import round_matrix


def corrected_layer(
    weight: Tensor,  # (m, n)
    bias: Tensor | None,  # (m,)
    entry: PlanEntry,
    correct: Correct,
    moments: LayerMoments,
    damping: float,
    stored: torch.dtype,
) -> tuple[CorrectedLinear, PlanEntry]:
    """The layer of a plan's entry, and the entry with tr(E′ C E′ᵀ) of the error E′ that is left, where C is known."""
    assert entry.rank is not None and entry.bits is not None
    wide = weight.detach().double()
    inner = round_matrix(weight, entry.bits, entry.scale_group, IntLinear)
    left, right = correct(wide - inner.weight.double(), moments, damping, entry.rank)
    layer = CorrectedLinear.correct(inner, left, right, bias, entry.transposed, stored).to(weight.dtype)
    measured = None
    if moments.input is not None:
        rest = wide - layer.to_dense(torch.float64)
        measured = float(((rest @ damp(moments.input.double(), damping)) * rest).sum())
    return layer, entry.model_copy(update={"measured_loss": measured})
