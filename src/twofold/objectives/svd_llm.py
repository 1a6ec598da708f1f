"""Whitened inputs: min E‖(W − W′) x‖².

The optimum of DRONE (Chen 2021), SVD-LLM (Wang, ICLR 2025) and Swift-SVD (Qi, ICML 2026).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold.objectives import LayerMoments, Problem, objective
from twofold.objectives._sides import input_side, problem_of

if TYPE_CHECKING:
    from torch import Tensor


@objective(
    "svd-llm", source="Wang et al., ICLR 2025 (arXiv 2403.07378)", needs={"input"}, loss="output", full={"input"}
)
def svd_llm(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    return problem_of(weight, input_side(weight, moments, damping), None, {"input"})
