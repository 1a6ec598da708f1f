"""What an objective is: the two metrics of min ‖left^½ (W − W′) right^½‖_F, made from the moments of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.linalg.metric import damp
from twofold.linalg.spectrum import Side, gram, smaller_side

Statistic = Literal[
    "input", "whole_input", "input_mean", "input_abs", "input_square", "gradient", "gradient_square", "fisher_rows"
]  # fmt: skip
Loss = Literal["nats", "output", "weight"]


@dataclass(frozen=True)
class LayerMoments:
    """The moments of one layer, averaged over the calibration tokens; what was not asked for is None.

    For W (m, n) and C = E[x xᵀ], G = E[g gᵀ]; of each pair one side suffices (section 1 of docs/design.md). C itself is there
    whatever its size if "whole_input" was asked for.
    """

    input: Tensor | None = None  # C (n, n)
    output: Tensor | None = None  # W C Wᵀ (m, m)
    gradient: Tensor | None = None  # G (m, m)
    input_gradient: Tensor | None = None  # Wᵀ G W (n, n)
    input_mean: Tensor | None = None  # E[x] (n,)
    input_trace: float = 0.0  # tr C
    gradient_trace: float = 0.0  # tr G
    input_abs: Tensor | None = None  # E|x| (n,)
    input_square: Tensor | None = None  # the diagonal of C (n,)
    gradient_square: Tensor | None = None  # the diagonal of G (m,)
    fisher_rows: Tensor | None = None  # Σ_j E[(g_i x_j)²] (m,)


@dataclass(frozen=True)
class Problem:
    """What the kernel decomposes: a metric over the smaller side, and the weight's Gram matrix in the other metric."""

    metric: Tensor | None  # (k, k) or (k,)
    gram: Tensor  # (k, k)
    side: Side


Correct = Callable[[Tensor, LayerMoments, float, int], tuple[Tensor, Tensor]]
Build = Callable[[Tensor, LayerMoments, float], Problem]
StructureKind = Literal["mlp", "value-output", "query-key", "dense-columns", "shared-basis"]


@dataclass(frozen=True)
class Objective:
    """An objective under its published name.

    ``loss`` is the unit of σ²: "nats" (twice an estimate of the model's loss per token, one scale for every layer),
    "output" (energy of the layer's output) or "weight" (energy of the weight); the last two differ in scale from layer to layer.

    An objective without ``build`` has no problem of this kind: it cuts the structures of the kinds that it names
    (twofold.structures), or corrects the error of a weight that is rounded to integers, by ``correct``.
    """

    name: str
    source: str
    needs: frozenset[Statistic]
    loss: Loss
    build: Build | None
    structures: frozenset[StructureKind] = frozenset()
    correct: Correct | None = None


OBJECTIVES: dict[str, Objective] = {}
FAMILIES: dict[str, Callable[[str], Objective | None]] = {}  # how the names of a family look → the objective of a name


def objective(name: str, *, source: str, needs: set[Statistic], loss: Loss) -> Callable[[Build], Build]:
    """Register a function (weight (m, n) in float64, moments, damping) → Problem as an objective."""

    def register(build: Build) -> Build:
        OBJECTIVES[name] = Objective(name, source, frozenset(needs), loss, build)
        return build

    return register


def structural_objective(
    name: str, *, source: str, needs: set[Statistic], loss: Loss, structures: set[StructureKind]
) -> None:
    """Register an objective that chooses the sizes of several weights together, or has more than one way to a size."""
    OBJECTIVES[name] = Objective(name, source, frozenset(needs), loss, None, frozenset(structures))


def objective_family(form: str) -> Callable[[Callable[[str], Objective | None]], Callable[[str], Objective | None]]:
    """Register a function from names to objectives; it gives None for a name that is not of the family.

    Args:
        form: how its names look, for messages.
    """

    def register(function: Callable[[str], Objective | None]) -> Callable[[str], Objective | None]:
        FAMILIES[form] = function
        return function

    return register


def corrective_objective(name: str, *, source: str, needs: set[Statistic]) -> Callable[[Correct], Correct]:
    """Register a function (error (m, n) in float64, moments, damping, rank) → (m, r), (r, n) as a correction of integers."""

    def register(correct: Correct) -> Correct:
        OBJECTIVES[name] = Objective(name, source, frozenset(needs), "output", None, correct=correct)
        return correct

    return register


def get_objective(name: str) -> Objective:
    """The objective of a name.

    Raises:
        TwofoldError: if there is none.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    for family in FAMILIES.values():
        found = family(name)
        if found is not None:
            return found
    raise TwofoldError(
        f"there is no objective {name!r}; choose one of {', '.join(sorted(OBJECTIVES))}, or two metrics as in "
        "whitened+rows: plain, abs, diagonal or whitened inputs, and plain, rows, diagonal or whitened outputs"
    )


def input_side(weight: Tensor, moments: LayerMoments, damping: float) -> Tensor:
    """The damped C where it is the metric (m > n), else the damped W C Wᵀ.

    Damping C by δ·mean(diag C) adds δ·mean(diag C)·W Wᵀ to W C Wᵀ, so the two ways to measure agree.
    """
    m, n = weight.shape
    if smaller_side(m, n) == "columns":
        assert moments.input is not None
        return damp(moments.input.to(weight), damping)
    if moments.input is not None:
        return gram(weight, damp(moments.input.to(weight), damping))
    assert moments.output is not None
    return _damped_product(weight, moments.output.to(weight), damping * moments.input_trace / n)


def gradient_side(weight: Tensor, moments: LayerMoments, damping: float) -> Tensor:
    """The damped G where it is the metric (m ≤ n), else the damped Wᵀ G W."""
    m, n = weight.shape
    if smaller_side(m, n) == "rows":
        assert moments.gradient is not None
        return damp(moments.gradient.to(weight), damping)
    if moments.gradient is not None:
        return gram(weight, damp(moments.gradient.to(weight), damping))
    assert moments.input_gradient is not None
    return _damped_product(weight.T, moments.input_gradient.to(weight), damping * moments.gradient_trace / m)


def _damped_product(wide: Tensor, moment: Tensor, added: float) -> Tensor:
    if added == 0.0 and not torch.any(moment):
        added = 1.0  # nothing was measured: every direction weighs the same, as damp() does
    return moment + added * (wide @ wide.T)
