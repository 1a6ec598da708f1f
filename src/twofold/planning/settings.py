"""How small a model becomes."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field
from typing_extensions import Self

from twofold.allocate import Allocating
from twofold.model.settings import Weights
from twofold.objectives import OBJECTIVES
from twofold.quantize.settings import Stored
from twofold.settings.base import Settings
from twofold.settings.goal import Goal, parse_perplexity
from twofold.settings.sizes import parse_budget

ALIGNED = 8  # ranks are multiples of this where the budget is in time and nothing else was asked for
SIZES = ("keep", "budget", "latency", "perplexity_at_most", "kl_at_most")  # exactly one says how small a model becomes


def _readable(perplexity: str | None) -> str | None:
    """Refuse a perplexity that can't be read."""
    if perplexity is not None:
        parse_perplexity(perplexity)
    return perplexity


class Size(Settings):
    """How small a model becomes."""

    TITLE = "Size"

    keep: Annotated[
        float | None, Field(gt=0, le=1, description="share of the factorized weights' parameters to keep, in (0, 1]")
    ] = None
    budget: Annotated[
        str | None, Field(description="size of the whole model: parameters (90M), bytes (180MB) or a share (70%)")
    ] = None
    latency: Annotated[
        float | None,
        Field(gt=0, le=1, description="share of the dense linear layers' measured time for one token, on this machine"),
    ] = None
    perplexity_at_most: Annotated[
        str | None,
        pydantic.BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value),
        pydantic.AfterValidator(_readable),
        Field(description="the smallest model with this perplexity at most: 25, or 1.1x the dense model's"),
    ] = None
    kl_at_most: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="the smallest model with this divergence from the dense one at most, in nats per prediction",
        ),
    ] = None
    rank_multiple: Annotated[
        int | None, Field(ge=1, description="ranks are multiples of this; 1, or 8 with `latency`")
    ] = None
    min_rank: Annotated[int, Field(ge=1, description="the smallest rank")] = 1

    @property
    def aligned(self) -> int:
        """The number that ranks are multiples of."""
        return self.rank_multiple or (1 if self.latency is None else ALIGNED)

    @property
    def in_bytes(self) -> bool:
        """Whether the budget is in bytes."""
        return self.budget is not None and parse_budget(self.budget)[1] == "bytes"

    @property
    def goal(self) -> Goal | None:
        """The quality that the model must keep, if that is asked for in the place of a size."""
        if self.kl_at_most is not None:
            return Goal("divergence", self.kl_at_most)
        if self.perplexity_at_most is not None:
            number, kind = parse_perplexity(self.perplexity_at_most)
            return Goal(kind, number)
        return None


class Planning(Stored, Size, Weights, Allocating):
    """All that a plan depends on."""

    @property
    def corrects(self) -> bool:
        """Whether whole weights are rounded to integers and their error is corrected."""
        return OBJECTIVES.get(self.objective).correct is not None

    def at(self, keep: float) -> Self:
        """Return the same settings with a share to keep in the place of a goal; those without a goal as they are."""
        if self.goal is None:
            return self
        return self.model_copy(update={"keep": keep, "perplexity_at_most": None, "kl_at_most": None})
