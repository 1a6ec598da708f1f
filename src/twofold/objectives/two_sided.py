"""Both sides: min tr(G ΔW C ΔWᵀ), the Kronecker-factored second-order estimate of the model's loss. The default.

σ²/2 is an estimate of the divergence per token, in nats, that leaving a component out costs, on one scale for every layer.
Source: the K-FAC metric (Martens & Grosse 2015); OBD-LLM (arXiv 2604.00821), GFWSVD, IO-SVD, 2025–26.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold.objectives import LayerMoments, Problem, objective
from twofold.objectives._sides import gradient_side, input_side, problem_of

if TYPE_CHECKING:
    from torch import Tensor


@objective(
    "two-sided", source="K-FAC metric; arXiv 2604.00821", needs={"input", "gradient"}, loss="nats",
    full={"input", "gradient"},
)  # fmt: skip
def two_sided(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    inputs, gradients = input_side(weight, moments, damping), gradient_side(weight, moments, damping)
    return problem_of(weight, inputs, gradients, {"input", "gradient"})
