"""Weighted low-rank approximation, decomposed on the smaller side only.

    min over rank r of ‖G^½ (W − W′) C^½‖_F,    W (m, n), C (n, n), G (m, m).

With M = G^½ W C^½ = U Σ Vᵀ the answer is W′ = G^-½ U_r Σ_r V_rᵀ C^-½, at a loss of exactly Σ_{i>r} σ_i².
Only the smaller side is decomposed:
- rows (m ≤ n): U are the eigenvectors of G^½ (W C Wᵀ) G^½, and W′ = (G^-½ U_r)(U_rᵀ G^½ W). No root of C.
- columns (m > n): V are those of C^½ (Wᵀ G W) C^½, and W′ = (W C^½ V_r)(V_rᵀ C^-½). No root of G.
So one kernel serves both sides: a *metric* whose root is taken, and the *gram* of the weight in the other
metric. Source: Eckart & Young 1936; section 1 of docs/design.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twofold.linalg.metric import Metric, eigen, is_full, metric_product, root_values, roots

Side = Literal["rows", "columns"]


def smaller_side(out_features: int, in_features: int) -> Side:
    """Return the side that is decomposed: rows (outputs) if m ≤ n, else columns (inputs)."""
    return "rows" if out_features <= in_features else "columns"


@dataclass(frozen=True)
class Spectrum:
    """The decomposition of one weight (or of a batch of one shape); any rank can be read from it.

    ``values`` (..., k) are σ², largest first, k = min(m, n); those below the numerical cutoff are zero.
    ``basis`` (..., k, k) is B = metric^-½ U. With A its first r columns, the projector of rank r is A (Aᵀ metric A)⁻¹ Aᵀ metric:
    it acts on W from the left on the side "rows", and transposed from the right on "columns". The inverse is the identity but for
    rounding; with it the basis may be kept in float32.
    """

    values: Tensor  # (..., k)
    basis: Tensor  # (..., k, k), metric^-½ U
    side: Side

    def __getitem__(self, index: int) -> Spectrum:
        """Return one problem of a batch."""
        return Spectrum(self.values[index], self.basis[index], self.side)

    @property
    def tails(self) -> Tensor:  # (..., k + 1)
        """The loss of keeping rank 0, 1, …, k: the sums of the values left out."""
        backwards = self.values.flip(-1).cumsum(-1).flip(-1)
        return torch.cat([backwards, backwards.new_zeros(*backwards.shape[:-1], 1)], -1)

    @property
    def numerical_rank(self) -> int:
        """How many values are above zero; more rank than that buys nothing."""
        return int((self.values > 0).sum(-1).max())


def gram(
    weight: Tensor,  # (..., m, n)
    other: Metric,  # the metric on the larger side: over n if m ≤ n, else over m
) -> Tensor:  # (..., k, k)
    """Return W C Wᵀ on the side "rows", Wᵀ G W on the side "columns"."""
    wide = weight if weight.shape[-2] <= weight.shape[-1] else weight.mT  # (..., k, p)
    product = wide @ metric_product(other, wide.mT)
    return (product + product.mT) / 2


def spectrum_of(
    metric: Metric,  # over the k directions of the smaller side
    gram: Tensor,  # (..., k, k), of the weight in the metric of the larger side
    side: Side,
    eps: float | None = None,
    known: KnownRoots | None = None,
) -> Spectrum:
    """Decompose one weight, or a batch of them, for every rank at once.

    The dtype of ``gram`` is the working dtype; a Gram matrix squares the condition number, so form it in
    float64 where the device has it. ``eps`` is the precision that the metric was summed in, if it is lower.
    ``known`` remembers the roots of a metric for the next weight that has the same input.

    Raises:
        ValueError: if the gram matrix or the metric holds NaN or infinity.
    """
    k = gram.shape[-1]
    if not torch.isfinite(gram).all() or (metric is not None and not torch.isfinite(metric).all()):
        raise ValueError("the weight or its moments hold NaN or infinity")
    if metric is None:
        inverse, middle = torch.eye(k, dtype=gram.dtype, device=gram.device).expand_as(gram), gram
    elif is_full(metric, k, gram.dim() - 2):
        root, inverse = _distinct_roots(metric.to(gram.dtype), eps, known or KnownRoots())
        middle = root @ gram @ root
    else:
        root, inverse_root = root_values(metric.to(gram.dtype), 0.0)
        inverse = torch.diag_embed(inverse_root)
        middle = root[..., :, None] * gram * root[..., None, :]
    values, vectors = eigen((middle + middle.mT) / 2)
    values, vectors = values.flip(-1), vectors.flip(-1)
    cutoff = values[..., :1].clamp_min(0) * k * torch.finfo(gram.dtype).eps
    values = torch.where(values > cutoff, values, 0)
    return Spectrum(values, inverse @ vectors, side)


class KnownRoots:
    """The roots of the metric that was decomposed last: weights that share an input often follow one another."""

    _known: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def of(self, metrics: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:  # (b, k, k), or (k, k)
        """Return the roots of a metric, or of a batch of them."""
        if self._known is None or not torch.equal(self._known[0], metrics):
            self._known = None  # frees the memory before more is taken
            self._known = metrics, roots(metrics, eps)
        return self._known[1]


def _distinct_roots(
    metrics: Tensor,  # (..., k, k)
    eps: float | None,
    known: KnownRoots,
) -> tuple[Tensor, Tensor]:
    """Return the roots of metrics; those that are equal in a batch, since their weights share an input, are decomposed once."""
    if metrics.dim() != 3:
        return known.of(metrics, eps)
    distinct: list[Tensor] = []
    places: list[int] = []
    for metric in metrics:
        place = next((i for i, other in enumerate(distinct) if torch.equal(metric, other)), len(distinct))
        if place == len(distinct):
            distinct.append(metric)
        places.append(place)
    root, inverse = known.of(torch.stack(distinct), eps)
    if len(distinct) == len(places) == 1:
        return root, inverse
    return root[places], inverse[places]


def truncate(
    weight: Tensor,  # (m, n)
    spectrum: Spectrum,
    metric: Metric,  # over the k directions of the smaller side: the one that was decomposed in
    rank: int,
) -> tuple[Tensor, Tensor]:  # (m, rank), (rank, n)
    """Return the two factors of the best approximation of ``weight`` of a rank, in the dtype of the spectrum's values.

    Raises:
        ValueError: if the rank is not between 1 and min(m, n).
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"the rank must be between 1 and {min(weight.shape)}, got {rank}")
    dtype = spectrum.values.dtype
    weight = weight.to(dtype)
    inner = spectrum.basis[:, :rank].to(dtype)
    outer = metric_product(metric, inner)
    overlap = inner.mT @ outer
    outer = solve_semidefinite((overlap + overlap.mT) / 2, outer.mT).mT
    if spectrum.side == "rows":
        return inner, outer.mT @ weight
    return weight @ outer, inner.mT


def solve_semidefinite(
    matrix: Tensor,  # (r, r), positive semidefinite
    right: Tensor,  # (r, k)
    least: float = 0.0,  # the smallest entry of the Cholesky factor's diagonal, over the largest, at which it is trusted
) -> Tensor:  # (r, k)
    """Return matrix⁻¹ right, by Cholesky where that is possible, else by the pseudo-inverse."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if int(info) == 0 and (least == 0.0 or float(diagonal.min() / diagonal.max()) > least):
        solution: Tensor = torch.cholesky_solve(right, factor)
        return solution
    inverse: Tensor = torch.linalg.pinv(matrix, hermitian=True)
    return inverse @ right


def truncation_loss(
    weight: Tensor,  # (m, n)
    approximation: Tensor,  # (m, n), the product of the two factors
    metric: Metric,  # over the smaller side
    gram: Tensor,  # (k, k), of the weight in the other metric
) -> float:
    """Measure ‖G^½ (W − W′) C^½‖² from the stored product and not from the spectrum.

    On the side "rows" the approximation is P W with some P (m, m), found by least squares, so that the loss
    is tr(G (1 − P)(W C Wᵀ)(1 − P)ᵀ); on "columns" it is the mirror image. Only moments of the smaller
    side are needed.
    """
    if weight.shape[0] > weight.shape[1]:
        weight, approximation = weight.T, approximation.T
    weight, approximation = weight.to(gram.dtype), approximation.to(gram.dtype)
    # P W = approximation; the weight may lack full rank, or nearly so.
    p = solve_semidefinite(weight @ weight.T, weight @ approximation.T, least=1e-6).mT
    missing = torch.eye(len(p), dtype=gram.dtype, device=gram.device) - p
    return float((metric_product(metric, missing @ gram) * missing).sum())


def weighted_low_rank(
    weight: Tensor,  # (m, n)
    rank: int,
    left: Metric = None,  # over m
    right: Metric = None,  # over n
) -> tuple[Tensor, Tensor]:  # (m, rank), (rank, n)
    """Return the best approximation of one weight in the norm ‖left^½ (W − W′) right^½‖_F, as two factors in float64.

    >>> import torch
    >>> weight = torch.randn(6, 8)                    # (m, n)
    >>> left, right = weighted_low_rank(weight, 3)    # (6, 3), (3, 8)
    >>> (left @ right).shape
    torch.Size([6, 8])
    """
    side = smaller_side(*weight.shape)
    weight = weight.double()
    left, right = (None if metric is None else metric.double() for metric in (left, right))
    near, far = (left, right) if side == "rows" else (right, left)
    return truncate(weight, spectrum_of(near, gram(weight, far), side), near, rank)


def eigen_low_rank(
    weight: Tensor,  # (m, n)
    rank: int,
    metric: Tensor,  # over n, (n, n)
) -> tuple[Tensor, Tensor]:  # (m, rank), (rank, n)
    """Return the best approximation in the norm ‖(W − W′) metric^½‖_F, by an SVD of W Q Λ^½ where metric = Q Λ Qᵀ."""
    values, vectors = eigen(metric)  # Λ, Q
    root, inverse = root_values(values, values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps)
    left, sizes, right = torch.linalg.svd((weight @ vectors) * root, full_matrices=False)
    return left[:, :rank] * sizes[:rank], (right[:rank] * inverse) @ vectors.T
