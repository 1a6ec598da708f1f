"""A step against the gradient of the divergence, in closed form, that leaves every rank as it is.

The closed form treats each layer alone, and by moments of some ten thousand tokens. Here the factored model is run over the
tokens once more, with the gradient D = E[g x̂ᵀ] of the divergence (dense ‖ factored) by every whole weight W' of its own, with
C = E[x̂ x̂ᵀ] and G = E[g gᵀ]. In K-FAC's coordinates W̃ = G^½ W' C^½ the natural gradient is the plain one, D̃ = G^-½ D C^-½
(Martens & Grosse 2015); G is that of the very gradients that are followed, not of sampled labels: it measured as well, and
needs no pass of its own. Of it is taken:

1. What two halves of the tokens agree on. The rest is scatter of the text. In the eigenbases of G and C, cut into eight parts by
   rank, each of the 64 blocks is multiplied by Σ D̃₁D̃₂ / Σ ((D̃₁ + D̃₂)/2)², between 0 and 1: Wiener's filter, with the spectra
   estimated from the halves.
2. What does not raise the rank to first order: the projection on the tangent space of the matrices of rank r at W̃.
3. As far as it helps: one number for the whole model, by a search on held-out text.

The result is cut to rank r again in the same coordinates. One projected gradient update after the cut, and a second cut, are
ZS-SVD's (arXiv 2602.02848); the curvature, the filter and the search are ours.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from twofold.refine import Refined, refinement
from twofold.settings.base import Settings
from twofold.settings.price import Price

STEP = 12  # time of a step and of the search for its size, over that of a decomposition


class NaturalGradient(Settings):
    """How many steps are taken."""

    TITLE = "Refinement"

    refine_rounds: Annotated[int, Field(ge=1, description="natural-gradient: gradients and steps")] = 1


def _seconds(price: Price, settings: Settings) -> float:
    each = price.learn + price.blocks * STEP * price.speeds.decompose
    return price.predict + settings.part(NaturalGradient).refine_rounds * each


def _halves(price: Price, settings: Settings) -> float:
    """Return the bytes of two halves of the gradient, with the moments of both sides."""
    return 8.0 * price.gradient


def _memory(price: Price, settings: Settings) -> float:
    return _halves(price, settings) + 4 * price.trained  # and the factors before


@refinement(
    "natural-gradient",
    needs={"two factors"},
    trains=False,
    settings=NaturalGradient,
    seconds=_seconds,
    memory=_memory,
    disk=_halves,
)
def natural_gradient(job: Any) -> Refined:
    from twofold.refine.steps.natural_gradient import natural_gradient

    return natural_gradient(job, job.recipe.part(NaturalGradient).refine_rounds)
