"""A quantized matrix with a correction of low rank, W ≈ Q + A B: the best A B for the error E = W − Q, by published methods.

    lqer         SVD of E S, S the mean magnitudes of the inputs                 Zhang et al. 2024 (arXiv 2402.02446)
    qera-exact   min ‖(E − A B) C^½‖_F with C = E[x xᵀ]                          Zhang et al. 2024 (arXiv 2410.06040)
    eora         SVD of E Q Λ^½ with C = Q Λ Qᵀ, taken back by the inverse       Liu et al. 2024 (arXiv 2410.21271)

The last two minimize the same error of the outputs, and their products agree; they take another root of C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twofold.linalg.metric import damp, eigen
from twofold.linalg.spectrum import weighted_low_rank
from twofold.objectives.base import LayerMoments, corrective_objective


@corrective_objective("lqer", source="Zhang et al. 2024 (arXiv 2402.02446)", needs={"input_abs"})
def lqer(error: Tensor, moments: LayerMoments, damping: float, rank: int) -> tuple[Tensor, Tensor]:
    assert moments.input_abs is not None
    return weighted_low_rank(error, rank, None, damp(moments.input_abs.to(error).square(), damping, full=False))


@corrective_objective("qera-exact", source="Zhang et al. 2024 (arXiv 2410.06040)", needs={"whole_input"})
def qera_exact(error: Tensor, moments: LayerMoments, damping: float, rank: int) -> tuple[Tensor, Tensor]:
    assert moments.input is not None
    return weighted_low_rank(error, rank, None, damp(moments.input.to(error), damping))


@corrective_objective("eora", source="Liu et al. 2024 (arXiv 2410.21271)", needs={"whole_input"})
def eora(error: Tensor, moments: LayerMoments, damping: float, rank: int) -> tuple[Tensor, Tensor]:
    assert moments.input is not None
    values, vectors = eigen(damp(moments.input.to(error), damping))  # Λ, Q
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    root = torch.where(kept, values, 0).sqrt()
    inverse = torch.where(kept, 1 / root.clamp_min(torch.finfo(values.dtype).tiny), 0)
    left, sizes, right = torch.linalg.svd((error @ vectors) * root, full_matrices=False)
    return left[:, :rank] * sizes[:rank], (right[:rank] * inverse) @ vectors.T
