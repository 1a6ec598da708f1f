"""Closed form, layer after layer, on what the layers before have become (AA-SVD, arXiv 2604.02119).

A layer of the factored model gets inputs x̂ that differ from the x of the dense model. The best map from x̂ to the dense
output Wx is W̃ = W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹; its best approximation of the planned rank in the metric of the objective, with
E[x̂ x̂ᵀ] for the inputs, takes the layer's place before the next layer is looked at.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from twofold.refine import Refined, refinement
from twofold.settings.base import Settings
from twofold.settings.price import Price


class Anchored(Settings):
    """What a layer aims at."""

    TITLE = "Refinement"

    anchor_mix: Annotated[
        float,
        Field(
            ge=0, le=1, description="anchored: how far to aim at the dense model's outputs, 0 is at the weight itself"
        ),
    ] = 1.0


def _seconds(price: Price, settings: Settings) -> float:
    speeds = price.speeds
    return price.blocks * (price.batches * 5 * speeds.forward + 2 * speeds.decompose)


@refinement(
    "anchored",
    needs={"chain", "whole inputs", "two factors", "float layers"},
    trains=False,
    settings=Anchored,
    seconds=_seconds,
    published={"anchored": "svd-llm", "aa-svd": "svd-llm"},
)
def anchored(job: Any) -> Refined:
    from twofold.refine.steps.anchored import anchored

    return anchored(job, job.recipe.part(Anchored).anchor_mix)
