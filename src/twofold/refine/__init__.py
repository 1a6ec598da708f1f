"""The refinements by name, one file each: they better what the closed form has made, on the same calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias

import pydantic
from pydantic import Field

from twofold.host.progress import duration
from twofold.planning.settings import Planning
from twofold.registry import Registry
from twofold.settings.base import Settings, split_names
from twofold.settings.price import Price


class Refined(pydantic.BaseModel, extra="forbid"):
    """What one refinement did."""

    method: str
    steps: int  # of the optimizer
    planned: int  # steps, which the rates of all steps follow
    tokens: int  # seen in training, repeats counted; or another unit
    counted: str = "tokens"  # that unit
    parameters: int  # trained
    seconds: float
    unit: str = "nats"  # of the two losses, which are of held-out calibration data
    loss_before: float
    loss_after: float
    ended: str  # why it ended, in words

    @property
    def words(self) -> str:
        """What the refinement did, in a sentence without its full stop."""
        return (
            f"refined by {self.method}: {self.steps:,} of {self.planned:,} steps over {self.tokens:,} {self.counted} "
            f"in {duration(self.seconds)} changed {self.parameters:,} parameters; on held-out "
            f"calibration {kind_of(self.counted)} the loss went from {self.loss_before:.4f} to {self.loss_after:.4f} {self.unit} "
            f"({self.ended})"
        )


def kind_of(unit: str) -> str:
    """Return what data is whose size is told in a unit, in a word."""
    return "text" if unit == "tokens" else unit


Refine: TypeAlias = Callable[[Any], Refined]  # takes a twofold.refine.steps.job.Job
Cost: TypeAlias = Callable[[Price, Settings], float]


@dataclass(frozen=True)
class Refinement:
    """A refinement by its name.

    ``needs`` are capabilities, as run/check.py has them. ``trains``: it learns the windows by steps, and so may learn them by
    heart. ``seconds`` is what it takes, ``memory`` the bytes that it holds beside the model and its factors, ``disk`` those of
    its unfinished state. ``published`` are names of methods that are an objective with this refinement → the objective.
    """

    name: str
    run: Refine
    needs: frozenset[str]
    trains: bool
    settings: type[Settings] | None
    seconds: Cost
    memory: Cost
    disk: Cost
    published: Mapping[str, str]


REFINEMENTS: Registry[Refinement] = Registry("refinement", __name__)


def _chain(value: object) -> object:
    """Split names at commas; ``none`` stands for no refinement."""
    names = split_names(value)
    return [] if names == ["none"] else names


class Refining(Settings):
    """How the factors are bettered after the closed form."""

    TITLE = "Refinement"

    refine: Annotated[
        list[str],
        pydantic.BeforeValidator(_chain),
        Field(
            description=f"better the factors after the closed form, in turn: {', '.join(REFINEMENTS.names())}; or none"
        ),
    ] = []
    minutes: Annotated[float | None, Field(gt=0, description="that all refinements together may take")] = None
    refine_passes: Annotated[
        float, Field(gt=0, description="times that a refinement sees each window, if the minutes suffice")
    ] = 4
    refine_rate: Annotated[
        float, Field(gt=0, lt=1, description="how much of its own size a weight changes in a step of refinement")
    ] = 2e-4
    refine_labels: Annotated[
        float, Field(ge=0, le=1, description="share of the text's own next tokens in a refinement's loss of likeness")
    ] = 0.0
    refine_batch: Annotated[int, Field(ge=1, description="windows in a step of refinement")] = 2
    refine_steps: Annotated[
        int | None,
        Field(
            ge=1,
            description="steps in the place of passes and minutes; those that a run.json says are planned repeat that run",
        ),
    ] = None


class Stages(Planning, Refining):
    """The settings of all stages, from the calibration to the refinement."""


# Bytes of a trained number beside itself: gradient, two moments, the best, what stood before, one more at work.
TRAINED = 24


def training_memory(price: Price, settings: Settings) -> float:
    """Return what a training of all factors holds beside them, in bytes."""
    return price.trained * TRAINED


def refinement(
    name: str,
    *,
    seconds: Cost,
    needs: Iterable[str] = (),
    trains: bool = True,
    settings: type[Settings] | None = None,
    memory: Cost = training_memory,
    disk: Cost = lambda price, settings: 0.0,
    published: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Refine], Refine]:
    """Register a function that refines a model in place.

    Every refinement works on a whole model with factors of floating point, and is judged by the outputs that the task gives.
    """
    all_needs = frozenset((*needs, "whole model", "float factors", "token logits"))

    def register(function: Refine) -> Refine:
        method = Refinement(name, function, all_needs, trains, settings, seconds, memory, disk, published)
        REFINEMENTS.add(name, method)
        return function

    return register
