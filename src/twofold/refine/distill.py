"""End to end: the factors learn to predict what the dense model predicts.

The loss is the divergence of the model's task: KL(dense ‖ factored) over the next token, at every position of the calibration
windows (Hinton et al. 2015), over the classes of an image, or half the squared distance of features. The dense model is run
once; of its logits the most likely are kept. A share of the loss can be the cross-entropy of the text itself: the model then
learns the text too, which is a gain on texts of its kind and no longer only likeness to the dense model.
"""

from __future__ import annotations

from typing import Any

from twofold.refine import Refined, Refining, refinement
from twofold.settings.base import Settings
from twofold.settings.price import Price


def _seconds(price: Price, settings: Settings) -> float:
    return price.predict + settings.part(Refining).refine_passes * price.learn


@refinement("distill", seconds=_seconds)
def distill(job: Any) -> Refined:
    from twofold.refine.steps.distill import distill

    return distill(job)
