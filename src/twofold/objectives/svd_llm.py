"""Whitened inputs: min E‖(W − W′) x‖².

The optimum of DRONE (Chen 2021), SVD-LLM (Wang, ICLR 2025) and Swift-SVD (Qi, ICML 2026).
"""

from torch import Tensor

from twofold.linalg.spectrum import gram, smaller_side
from twofold.objectives.base import LayerMoments, Problem, input_side, objective


@objective("svd-llm", source="Wang et al., ICLR 2025 (arXiv 2403.07378)", needs={"input"}, loss="output")
def svd_llm(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    near = input_side(weight, moments, damping)
    if smaller_side(*weight.shape) == "rows":
        return Problem(None, near, "rows")
    return Problem(near, gram(weight, None), "columns")
