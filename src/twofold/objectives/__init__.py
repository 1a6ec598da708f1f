"""The objectives by name, one file each: the two metrics of min ‖left^½ (W − W′) right^½‖_F, made from the moments of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from twofold.registry import Registry
from twofold.settings.base import Settings

if TYPE_CHECKING:
    from torch import Tensor

Statistic: TypeAlias = Literal[
    "input", "whole_input", "input_mean", "input_abs", "input_square", "gradient", "gradient_square", "fisher_rows",
    "bias_mean",  # what centring takes: the means of what layers with a bias are given
]  # fmt: skip
Side: TypeAlias = Literal["rows", "columns"]  # that a problem is decomposed on: the smaller one
Loss: TypeAlias = Literal["nats", "output", "weight"]


@dataclass(frozen=True)
class LayerMoments:
    """The moments of one layer, averaged over the calibration tokens; what was not asked for is None.

    For W (m, n) and C = E[x xᵀ], G = E[g gᵀ]; of each pair one side suffices (section 1 of docs/design.md). C itself is there
    whatever its size if "whole_input" was asked for. Those of centred inputs are of x − E[x] in the place of x.
    """

    input: Tensor | None = None  # C (n, n)
    output: Tensor | None = None  # W C Wᵀ (m, m)
    gradient: Tensor | None = None  # G (m, m)
    input_gradient: Tensor | None = None  # Wᵀ G W (n, n)
    input_mean: Tensor | None = None  # E[x] (n,)
    output_mean: Tensor | None = None  # E[W x] (m,)
    input_trace: float = 0.0  # tr C
    gradient_trace: float = 0.0  # tr G
    input_abs: Tensor | None = None  # E|x| (n,)
    input_square: Tensor | None = None  # the diagonal of C (n,)
    gradient_square: Tensor | None = None  # the diagonal of G (m,)
    fisher_rows: Tensor | None = None  # Σ_j E[(g_i x_j)²] (m,)


@dataclass(frozen=True)
class Problem:
    """What the kernel decomposes: a metric over the smaller side, and the weight's Gram matrix in the other metric.

    With a ``mean`` both are of centred inputs, and the layer that is made of them has (W − W′) E[x] in its bias.
    """

    metric: Tensor | None  # (k, k) or (k,)
    gram: Tensor  # (k, k)
    side: Side
    mean: Tensor | None = None  # E[x] (n,)


Build: TypeAlias = "Callable[[Tensor, LayerMoments, float], Problem]"
Correct: TypeAlias = "Callable[[Tensor, LayerMoments, float, int], tuple[Tensor, Tensor]]"


@dataclass(frozen=True)
class Objective:
    """An objective under its published name.

    ``loss`` is the unit of σ²: "nats" (twice an estimate of the model's loss per token, one scale for every layer),
    "output" (energy of the layer's output) or "weight" (energy of the weight); the last two differ in scale from layer to layer.

    An objective without ``build`` has no problem of this kind: it cuts the structures of the kinds that it names
    (twofold.structures), or corrects the error of a weight that is rounded to integers, by ``correct``.

    ``centred``: it is of centred inputs by definition, whatever ``centre`` says. ``defaults`` are the settings that its source
    has beside it, for who names none.
    """

    name: str
    source: str
    needs: frozenset[Statistic]
    loss: Loss
    build: Build | None = None
    structures: frozenset[str] = frozenset()
    correct: Correct | None = None
    settings: type[Settings] | None = None  # its own, beside those that all objectives have
    full: frozenset[Literal["input", "gradient"]] | None = None  # its metrics that are whole moments; None: others
    together: Callable[[Settings], int] = lambda settings: 1  # weights that are decomposed as one, at the most
    centred: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def centres(self) -> bool:
        """Whether its metric of the inputs is of second moments, so that it has a form for centred ones."""
        return self.build is not None and not self.needs.isdisjoint({"input", "whole_input", "input_square"})


OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    __name__,
    "two metrics as in whitened+rows: plain, abs, diagonal or whitened inputs, and plain, rows, diagonal or whitened outputs",
)


def without_gradients() -> str:
    """Say which objectives that look at data need no gradient."""
    able = next((method.name for method in OBJECTIVES.all() if method.needs == {"input"} and not method.defaults), None)
    return f"use `objective={able}`" if able else "use another objective"


def without_data() -> str:
    """Say which objectives need no data."""
    able = next((method.name for method in OBJECTIVES.all() if not method.needs), None)
    return f"`objective={able}` needs none" if able else "no objective does without"


class Method(Settings):
    """What a rank is chosen to preserve."""

    TITLE = "Method"

    objective: Annotated[
        str,
        Field(
            description="what a rank is chosen to preserve, or how integers are corrected: "
            f"{', '.join(OBJECTIVES.names())}, or two metrics as in whitened+rows"
        ),
    ] = "two-sided"
    damping: Annotated[
        float, Field(ge=0, le=1, description="added to the diagonal of each moment, relative to its mean")
    ] = 1e-2


def objective(
    name: str,
    *,
    source: str,
    needs: set[Statistic],
    loss: Loss,
    settings: type[Settings] | None = None,
    full: set[Literal["input", "gradient"]] | None = None,
    centred: bool = False,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[Build], Build]:
    """Register a function (weight (m, n) in float64, moments, damping) → Problem as an objective.

    Args:
        full: the sides whose metric is a whole moment, damped, where all others are the identity: then what rounding loses is
            known too.
        centred: whether it is of centred inputs by definition.
        defaults: settings that its source has beside it, for who names none.
    """

    def register(build: Build) -> Build:
        whole = None if full is None else frozenset(full)
        own: dict[str, Any] = {"settings": settings, "full": whole, "centred": centred, "defaults": defaults}
        OBJECTIVES.add(name, Objective(name, source, frozenset(needs), loss, build, **own))
        return build

    return register


def structural_objective(
    name: str,
    *,
    source: str,
    needs: set[Statistic],
    loss: Loss,
    structures: set[str],
    settings: type[Settings] | None = None,
    together: Callable[[Settings], int] = lambda settings: 1,
) -> None:
    """Register an objective that chooses the sizes of several weights together, or has more than one way to a size."""
    kinds = frozenset(structures)
    method = Objective(name, source, frozenset(needs), loss, structures=kinds, settings=settings, together=together)
    OBJECTIVES.add(name, method)


def corrective_objective(
    name: str, *, source: str, needs: set[Statistic], settings: type[Settings] | None = None
) -> Callable[[Correct], Correct]:
    """Register a function (error (m, n) in float64, moments, damping, rank) → (m, r), (r, n) as a correction of integers."""

    def register(correct: Correct) -> Correct:
        OBJECTIVES.add(name, Objective(name, source, frozenset(needs), "output", correct=correct, settings=settings))
        return correct

    return register
