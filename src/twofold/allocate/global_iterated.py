"""Global, twice: the moments are measured again on the model that the first plan makes, and the ranks chosen anew.

The curvature at the dense model says what a small change costs. On the way to the factored model it is another, which the mean of
the moments of both comes nearer to. The second calibration takes as long as the first.
"""

from twofold.allocate import allocation
from twofold.allocate.global_ import lagrangian
from twofold.settings.base import Settings
from twofold.settings.price import Price


def _seconds(price: Price, settings: Settings) -> float:
    return price.sweep + price.blocks * (price.speeds.decompose + price.speeds.factorize)


allocation("global-iterated", needs={"nats", "size", "whole model"}, again=True, seconds=_seconds)(lagrangian)
