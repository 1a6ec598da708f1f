"""Block after block: the factors of a block learn to give what the dense block gives.

The block gets the factored model's own hidden states, and aims at the dense model's (as in AA-SVD, arXiv 2604.02119). Only one
block is trained at a time, so the memory is that of one block, and a step costs no head.
"""

from __future__ import annotations

from typing import Any

from twofold.refine import Refined, Refining, refinement
from twofold.settings.base import Settings
from twofold.settings.price import GRADIENTS, Price


def _seconds(price: Price, settings: Settings) -> float:
    speeds, passes = price.speeds, settings.part(Refining).refine_passes
    return price.blocks * price.batches * (2 * speeds.forward + passes * (speeds.forward + speeds.both * GRADIENTS))


@refinement("blockwise", needs={"chain", "two factors"}, seconds=_seconds)
def blockwise(job: Any) -> Refined:
    from twofold.refine.steps.blockwise import blockwise

    return blockwise(job)
