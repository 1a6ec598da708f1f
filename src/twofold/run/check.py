"""What goes with integers and what does not, refused before any work."""

from __future__ import annotations

from typing import Any

import torch

from twofold.allocate.base import get_allocation
from twofold.errors import TwofoldError
from twofold.model.load import LoadedModel
from twofold.model.survey import survey
from twofold.objectives.base import Objective, get_objective
from twofold.planning.bits import AUTO_BITS
from twofold.planning.structures import check_structural
from twofold.quantize.loss import MEASURED
from twofold.quantize.rounding import need_torchao
from twofold.refine.base import get_refinement
from twofold.run.estimate.memory import Way
from twofold.settings.recipe import Recipe
from twofold.task.held_out import gives_logits


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


def check_methods(recipe: Recipe) -> None:
    """Refuse methods that there are not, or that do not go with one another, whatever the model is.

    Raises:
        TwofoldError: naming the first of them.
    """
    check_refinements(recipe)
    check_bits(recipe, get_objective(recipe.objective))
    check_structural(recipe, bool(get_objective(recipe.objective).structures))
    check_recalibrated(recipe)
    if "perplexities" in get_allocation(recipe.allocate).needs and (
        recipe.latency is not None or recipe.bits is not None
    ):
        raise TwofoldError(
            f"--allocate {recipe.allocate} measures shares of numbers stored as floating point, which a budget in time and "
            "--bits do not count by; use --allocate global"
        )


def _check_streamed(recipe: Recipe, way: Way) -> None:
    """Refuse what needs the whole model in memory, where it is worked through block by block.

    Raises:
        TwofoldError: with the memory that it would take.
    """
    objective = get_objective(recipe.objective)
    if objective.structures:
        raise TwofoldError(
            f"--objective {recipe.objective} works on a model that is whole in memory, and this one is worked through "
            f"block by block; use another objective, or give it {way.resident / 1e9:.1f} GB with --memory"
        )
    if objective.needs and (recipe.calibration == ["self"] or recipe.continuations):
        put_right = (
            "name some with --calibration FILE" if recipe.calibration == ["self"] else "leave --continuations out"
        )
        raise TwofoldError(
            "texts to calibrate on can't be sampled from a model that is worked through block by block (each token would read "
            f"all of its weights); {put_right}, or give it {way.resident / 1e9:.1f} GB with --memory"
        )
    if recipe.bits is not None or recipe.kept_bits is not None:
        raise TwofoldError(
            "a model that is worked through block by block can't be rounded to integers yet; leave --bits and --dense-bits out, "
            f"or give it {way.resident / 1e9:.1f} GB with --memory"
        )
    if recipe.refine:
        raise TwofoldError(
            "a model that is worked through block by block can't be refined yet; leave --refine out, or give it "
            f"{way.resident / 1e9:.1f} GB with --memory"
        )
    if get_allocation(recipe.allocate).needs or get_allocation(recipe.allocate).again:
        raise TwofoldError(
            f"--allocate {recipe.allocate} measures the whole model, and this one is worked through block by block; use "
            f"--allocate global, or give {way.resident / 1e9:.1f} GB with --memory"
        )
    if recipe.goal is not None:
        raise TwofoldError(
            f"{recipe.goal.flag} is searched for on the whole model, and this one is worked through block by block; give "
            f"--keep or --budget, or {way.resident / 1e9:.1f} GB with --memory"
        )


def check_recalibrated(recipe: Recipe) -> None:
    """Refuse to measure the moments again where there are none, or no size to do it at.

    Raises:
        TwofoldError: with what to do in its place.
    """
    objective = get_objective(recipe.objective)
    if not get_allocation(recipe.allocate).again:
        return
    if recipe.goal is not None:
        raise TwofoldError(
            f"--allocate {recipe.allocate} measures the model at its size, which {recipe.goal.flag} does not say; give --keep "
            "or --budget, or use --allocate global"
        )
    if objective.loss != "nats" or objective.build is None:
        raise TwofoldError(
            f"--allocate {recipe.allocate} compares losses in nats, which {recipe.objective} does not give; use --objective "
            "two-sided, or --allocate global"
        )


def check_refinements(recipe: Recipe) -> None:
    """Refuse refinements that there are not, or that do not go with the objective.

    Raises:
        TwofoldError: naming the first of them.
    """
    objective = get_objective(recipe.objective)
    for name in recipe.refine:
        needs = get_refinement(name).needs
        if objective.structures and name != "distill":
            raise TwofoldError(
                f"{name} works on weights that are products of two of their own, and those of {recipe.objective} are not; "
                "use --refine distill"
            )
        if "inputs" in needs and "input" not in objective.needs:
            raise TwofoldError(
                f"the objective {recipe.objective} does not look at whole inputs, so it can't be {name}; "
                "use two-sided or svd-llm"
            )


def check_refinable(recipe: Recipe, loaded: LoadedModel) -> None:
    """Refuse a model in memory that the refinements of a recipe can't work on.

    Raises:
        TwofoldError: if it gives no token logits, or its blocks do not follow one another and a refinement needs that.
    """
    if not recipe.refine:
        return
    model: Any = loaded.model
    if not gives_logits(model, torch.zeros(1, 2, dtype=torch.int64)):
        raise TwofoldError(f"{type(model).__name__} gives no token logits, so it can't be refined; leave --refine out")
    for name in recipe.refine:
        if "chain" in get_refinement(name).needs and survey(loaded, []).chain is None:
            raise TwofoldError(
                f"{type(model).__name__} is not one block after another, so it can't be refined by {name}; "
                "use --refine distill"
            )
