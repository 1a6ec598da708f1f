"""Principal components of the centred outputs: min E‖(W − W′)(x − μ)‖², undamped, with the mean output in the bias.

LiteASR's W′ = V Vᵀ W and b′ = Ȳ + V Vᵀ (b − Ȳ), V the first r principal components of the outputs and Ȳ their mean, is the same
product and, since Ȳ = W μ + b, the same bias b + (W − W′) μ. Its ranks are the allocation ``lite-asr``. A layer without a bias
stays without one here, so its outputs are not centred; LiteASR would give it a bias.
Source: Kamahori et al., EMNLP 2025 (arXiv 2502.20583), and the code that was released with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold.objectives import LayerMoments, Problem, objective
from twofold.objectives._sides import input_side, problem_of

if TYPE_CHECKING:
    from torch import Tensor


@objective(
    "lite-asr", source="Kamahori et al., EMNLP 2025 (arXiv 2502.20583)", needs={"input"}, loss="output", centred=True,
    defaults={"allocate": "lite-asr", "form": "plain", "rank_multiple": 16},
)  # fmt: skip
def lite_asr(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
    return problem_of(weight, input_side(weight, moments, 0.0), None, {"input"})
