"""A metric of the inputs and one of the outputs, combined by hand: ``INPUTS+OUTPUTS``, as ``whitened+rows``.

    inputs      plain: the identity    abs: diag(E|x|), ASVD's    diagonal: diag(E x²)    whitened: C = E[x xᵀ], SVD-LLM's
    outputs     plain: the identity    rows: FWSVD's              diagonal: diag(E g²)    whitened: G = E[g gᵀ]

``plain+plain`` is svd, ``abs+plain`` asvd, ``plain+rows`` fwsvd, ``whitened+plain`` svd-llm and ``whitened+whitened`` two-sided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from twofold import linalg
from twofold.objectives import OBJECTIVES, LayerMoments, Loss, Objective, Problem, Statistic
from twofold.objectives._sides import gradient_side, input_side
from twofold.objectives.asvd import scaled_columns
from twofold.objectives.fwsvd import fisher_rows

if TYPE_CHECKING:
    from torch import Tensor

Diagonal: TypeAlias = "Callable[[Tensor, LayerMoments, float], Tensor | None]"


class _Side(NamedTuple):
    """A metric of one side: what it needs, and its diagonal; ``full`` has none, and is the damped moment itself."""

    needs: tuple[Statistic, ...]
    diagonal: Diagonal
    full: bool = False
    nats: bool = False  # whether it is a part of the second-order estimate


def _none(weight: Tensor, moments: LayerMoments, damping: float) -> None:
    return None


def _inputs(weight: Tensor, moments: LayerMoments, damping: float) -> Tensor:  # (n,)
    assert moments.input_square is not None
    return linalg.damp(moments.input_square.to(weight), damping, full=False)


def _outputs(weight: Tensor, moments: LayerMoments, damping: float) -> Tensor:  # (m,)
    assert moments.gradient_square is not None
    return linalg.damp(moments.gradient_square.to(weight), damping, full=False)


INPUTS = {
    "plain": _Side((), _none),
    "abs": _Side(("input_abs",), scaled_columns),
    "diagonal": _Side(("input_square",), _inputs, nats=True),
    "whitened": _Side(("input",), _none, full=True, nats=True),
}
OUTPUTS = {
    "plain": _Side((), _none),
    "rows": _Side(("fisher_rows",), fisher_rows),
    "diagonal": _Side(("gradient_square",), _outputs, nats=True),
    "whitened": _Side(("gradient",), _none, full=True, nats=True),
}


@OBJECTIVES.family
def combined(name: str) -> Objective | None:
    """The objective of two metrics; None if the name is not of that form."""
    left, plus, right = name.partition("+")
    if not plus or left not in INPUTS or right not in OUTPUTS:
        return None
    inputs, outputs = INPUTS[left], OUTPUTS[right]

    def build(weight: Tensor, moments: LayerMoments, damping: float) -> Problem:
        of_inputs = input_side if inputs.full else inputs.diagonal
        of_outputs = gradient_side if outputs.full else outputs.diagonal
        near, far = of_inputs(weight, moments, damping), of_outputs(weight, moments, damping)
        side = linalg.smaller_side(*weight.shape)
        # On the larger side a full moment is given as the weight's Gram matrix in it already.
        if side == "rows":
            return Problem(far, near if inputs.full and near is not None else linalg.gram(weight, near), side)
        return Problem(near, far if outputs.full and far is not None else linalg.gram(weight, far), side)

    loss: Loss = "nats" if inputs.nats and outputs.nats else "output" if inputs.nats and right == "plain" else "weight"
    needs = frozenset((*inputs.needs, *outputs.needs))
    return Objective(name, f"two metrics combined: {left} inputs, {right} outputs", needs, loss, build)
