"""A metric of the inputs and one of the outputs, combined by hand: ``INPUTS+OUTPUTS``, as ``whitened+rows``.

    inputs      plain: the identity    abs: diag(E|x|), ASVD's    diagonal: diag(E x²)    whitened: C = E[x xᵀ], SVD-LLM's
    outputs     plain: the identity    rows: FWSVD's              diagonal: diag(E g²)    whitened: G = E[g gᵀ]

``plain+plain`` is svd, ``abs+plain`` asvd, ``plain+rows`` fwsvd, ``whitened+plain`` svd-llm and ``whitened+whitened`` two-sided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from twofold.objectives import OBJECTIVES, LayerMoments, Loss, Objective, Problem, Statistic
from twofold.objectives._sides import diagonal, gradient_side, input_side, problem_of
from twofold.objectives.asvd import scaled_columns

if TYPE_CHECKING:
    from torch import Tensor

Metric: TypeAlias = "Callable[[Tensor, LayerMoments, float], Tensor | None]"


class _Side(NamedTuple):
    """A metric of one side: what it needs, and how it is made."""

    needs: tuple[Statistic, ...]
    metric: Metric
    nats: bool = False  # whether it is a part of the second-order estimate


def _none(weight: Tensor, moments: LayerMoments, damping: float) -> None:
    return None


INPUTS = {
    "plain": _Side((), _none),
    "abs": _Side(("input_abs",), scaled_columns),
    "diagonal": _Side(("input_square",), lambda w, moments, d: diagonal(w, moments.input_square, d), nats=True),
    "whitened": _Side(("input",), input_side, nats=True),
}
OUTPUTS = {
    "plain": _Side((), _none),
    "rows": _Side(("fisher_rows",), lambda w, moments, d: diagonal(w, moments.fisher_rows, d)),
    "diagonal": _Side(("gradient_square",), lambda w, moments, d: diagonal(w, moments.gradient_square, d), nats=True),
    "whitened": _Side(("gradient",), gradient_side, nats=True),
}


@OBJECTIVES.family
def combined(name: str) -> Objective | None:
    """Return the objective of two metrics; None if the name is not of that form."""
    left, plus, right = name.partition("+")
    if not plus or left not in INPUTS or right not in OUTPUTS:
        return None
    inputs, outputs = INPUTS[left], OUTPUTS[right]
    needs = frozenset((*inputs.needs, *outputs.needs))  # "input" and "gradient" for full moments alone

    def build(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
        layer = weight, moments, damping
        return problem_of(weight, inputs.metric(*layer), outputs.metric(*layer), needs)

    loss: Loss = "nats" if inputs.nats and outputs.nats else "output" if inputs.nats and right == "plain" else "weight"
    return Objective(name, f"two metrics combined: {left} inputs, {right} outputs", needs, loss, build)
