"""What rounding loses, in the metric that ranks are chosen in: tr(G E C Eᵀ) for W′ = W − E.

Calibration keeps one of the two metrics whole, that over the smaller side. Of the other one, which acts on the larger side,
the diagonal is used: the errors of round to nearest are nearly independent of one another, so that the products of two of them
cancel. What truncation loses is no such error; it is measured exactly, by the weight's Gram matrix in that other metric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twofold.linalg.metric import Metric, metric_product
from twofold.linalg.spectrum import Side, smaller_side, solve_semidefinite
from twofold.objectives import LayerMoments, Objective, Statistic
from twofold.quantize.factors import IntFactors


def rounding_needs(objective: Objective) -> frozenset[Statistic]:
    """Return what calibration must collect beside the objective's own moments, so that rounding can be measured."""
    squares: dict[str, Statistic] = {"input": "input_square", "gradient": "gradient_square"}
    return frozenset(square for side, square in squares.items() if side in (objective.full or ()))


def far_diagonal(
    weight: Tensor,  # (m, n)
    moments: LayerMoments,
    objective: Objective,
    damping: float,
) -> Tensor | None:  # (p,), p = max(m, n)
    """Return the diagonal of the damped metric over the larger side; None for an objective that it is not known of."""
    if objective.full is None:
        return None
    rows = smaller_side(*weight.shape) == "rows"
    if ("input" if rows else "gradient") not in objective.full:
        return weight.new_ones(max(weight.shape))
    square = moments.input_square if rows else moments.gradient_square
    if square is None:
        return None
    square = square.to(weight)
    if not torch.any(square):
        return torch.ones_like(square)  # nothing was measured: every direction weighs the same, as damp() does
    return square + damping * square.mean()


def factors_loss(
    factors: IntFactors,
    metric: Metric,  # over the k directions of the smaller side
    side: Side,
    gram: Tensor,  # (k, k), of the weight in the other metric
    far: Tensor,  # (p,), the diagonal of the other metric
) -> float:
    """Return the loss of factors in integers: of the space that the first one spans, exactly, and of the second's rounding."""
    whole = float(
        (gram * metric).sum() if metric is not None and metric.dim() == 2 else metric_product(metric, gram).trace()
    )
    spanned = solve_semidefinite(
        factors.overlap, factors.lifted.T @ gram @ factors.lifted
    )  # what the projector on A leaves
    truncated = whole - float(spanned.trace())
    rounded = (factors.reduce.weight if side == "rows" else factors.expand.weight.T).to(gram.dtype)  # (r, p)
    noise = rounded - factors.outer.to(gram.dtype)
    return max(truncated, 0.0) + float((factors.overlap * ((noise * far.to(gram.dtype)) @ noise.T)).sum())


def error_loss(
    error: Tensor,  # (m, n)
    metric: Metric,
    side: Side,
    far: Tensor,  # (p,)
) -> float:
    """Return the loss of an error whose entries are independent of one another, as those of a rounded dense matrix are."""
    wide = error if side == "rows" else error.T
    return float((metric_product(metric, (wide * far)) * wide).sum())
