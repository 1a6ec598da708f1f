"""What goes with integers and what does not, refused before any work."""

from __future__ import annotations

from twofold.errors import TwofoldError
from twofold.objectives import Objective
from twofold.planning.bits import AUTO_BITS
from twofold.quantize.loss import MEASURED
from twofold.quantize.rounding import need_torchao
from twofold.settings.recipe import Recipe


def check_bits(recipe: Recipe, objective: Objective) -> None:
    """Refuse settings that integers do not go with.

    Raises:
        TwofoldError: naming the first of them.
    """
    if objective.correct is not None and recipe.bits is None:  # the recipe says so first
        raise TwofoldError(f"--objective {objective.name} needs --bits")
    flag = f"--bits {recipe.bits}" if recipe.bits is not None else f"--dense-bits {recipe.dense_bits}"
    if recipe.bits is None and recipe.kept_bits is None:
        return
    need_torchao(flag)
    if objective.structures:
        raise TwofoldError(
            f"{flag} rounds factors of weights that are treated alone, and --objective {objective.name} cuts weights together; "
            "use another objective"
        )
    if recipe.latency is not None:
        raise TwofoldError(
            f"{flag} turns integers into numbers whenever a layer is called, which --latency has no measured times of; give "
            "--budget or --keep"
        )
    if recipe.bits == "auto" and objective.name not in MEASURED:
        raise TwofoldError(
            f"--bits auto measures what rounding loses, which is not known for --objective {objective.name}; use one of "
            f"{', '.join(sorted(MEASURED))}, or give a number of bits"
        )
    if recipe.bits == "auto" and recipe.allocate != "global":
        raise TwofoldError(
            f"--allocate {recipe.allocate} chooses ranks alone; use --allocate global with --bits auto, or give a number of bits"
        )


def stand_in(recipe: Recipe) -> Recipe:
    """A recipe whose ranks need no measuring: with the fewest bits in the place of those that are to be chosen."""
    if recipe.bits != "auto":
        return recipe
    return recipe.model_copy(update={"bits": str(AUTO_BITS[0]), "dense_bits": str(recipe.rest_bits or "none")})
