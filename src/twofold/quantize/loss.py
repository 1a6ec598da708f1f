"""What rounding loses, in the metric that ranks are chosen in: tr(G E C Eᵀ) for W′ = W − E.

Calibration keeps one of the two metrics whole, that over the smaller side. Of the other one, which acts on the larger side,
the diagonal is used: the errors of round to nearest are nearly independent of one another, so that the products of two of them
cancel. What truncation loses is no such error; it is measured exactly, by the weight's Gram matrix in that other metric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twofold.linalg.metric import Metric, metric_product
from twofold.linalg.spectrum import Side, smaller_side, solve_overlap
from twofold.objectives import LayerMoments, Objective, Statistic
from twofold.quantize.factors import IntFactors


def rounding_needs(objective: Objective) -> frozenset[Statistic]:
    """What calibration must collect beside the objective's own moments, so that rounding can be measured."""
    full = objective.full or frozenset()
    wanted: set[Statistic] = set()
    if "input" in full:
        wanted.add("input_square")
    if "gradient" in full:
        wanted.add("gradient_square")
    return frozenset(wanted)


def far_diagonal(
    weight: Tensor,  # (m, n)
    moments: LayerMoments,
    objective: Objective,
    damping: float,
) -> Tensor | None:  # (p,), p = max(m, n)
    """The diagonal of the damped metric over the larger side; None for an objective that it is not known of."""
    full = objective.full
    if full is None:
        return None
    rows = smaller_side(*weight.shape) == "rows"
    size = weight.shape[1] if rows else weight.shape[0]
    found = moments.input_square if rows else moments.gradient_square
    if ("input" if rows else "gradient") not in full:
        return weight.new_ones(size)
    if found is None:
        return None
    found = found.to(weight)
    if not torch.any(found):
        return torch.ones_like(found)  # nothing was measured: every direction weighs the same, as damp() does
    return found + damping * found.mean()


def factors_loss(
    factors: IntFactors,
    metric: Metric,  # over the k directions of the smaller side
    side: Side,
    gram: Tensor,  # (k, k), of the weight in the other metric
    far: Tensor,  # (p,), the diagonal of the other metric
) -> float:
    """The loss of factors in integers: of the space that the first one spans, exactly, and of the rounding of the second."""
    whole = float(
        (gram * metric).sum() if metric is not None and metric.dim() == 2 else metric_product(metric, gram).trace()
    )
    kept = solve_overlap(factors.overlap, factors.lifted.T @ gram @ factors.lifted)  # what the projector on A leaves
    truncated = whole - float(kept.trace())
    rounded = (factors.reduce.weight if side == "rows" else factors.expand.weight.T).to(gram.dtype)  # (r, p)
    noise = rounded - factors.outer.to(gram.dtype)
    return max(truncated, 0.0) + float((factors.overlap * ((noise * far.to(gram.dtype)) @ noise.T)).sum())


def error_loss(
    error: Tensor,  # (m, n)
    metric: Metric,
    side: Side,
    far: Tensor,  # (p,)
) -> float:
    """The loss of an error whose entries are independent of one another, as those of a rounded dense matrix are."""
    wide = error if side == "rows" else error.T
    return float((metric_product(metric, (wide * far)) * wide).sum())
