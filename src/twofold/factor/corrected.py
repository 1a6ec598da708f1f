"""A whole weight in integers with a correction of low rank, by the methods of objectives/corrections.py."""

from __future__ import annotations

import torch
from torch import Tensor

from twofold.linalg.metric import damp, working_dtype
from twofold.nn.int_matrix import IntLinear
from twofold.nn.layers.corrected import CorrectedLinear
from twofold.objectives import Correct, LayerMoments
from twofold.planning.plan import PlanEntry
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
    # In float64, on the processor where the device has none.
    wide = weight.detach().to(weight.device if working_dtype(weight.device) == torch.float64 else "cpu").double()
    inner = round_matrix(wide, entry.bits, entry.scale_group, IntLinear)
    left, right = correct(wide - inner.weight.to(wide), moments, damping, entry.rank)
    layer = CorrectedLinear.correct(inner, left, right, bias, entry.transposed, stored)
    measured = None
    if moments.input is not None:
        rest = wide - layer.to_dense(torch.float64)
        measured = float(((rest @ damp(moments.input.to(wide), damping)) * rest).sum())
    return layer.to(weight.device, weight.dtype), entry.model_copy(update={"measured_loss": measured})
