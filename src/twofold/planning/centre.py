"""Which layers have the mean of their inputs in their bias, so that what is left to lose is that of centred inputs.

With a bias b of its own, min E‖G^½ ((W − W′) x + (b − b′))‖² has b′ = b + (W − W′) μ, μ = E[x], and what is left is the loss
in E[(x − μ)(x − μ)ᵀ] = C − μ μᵀ, never more than that in C.
"""

from __future__ import annotations

from dataclasses import replace

from twofold.model.target import Targets
from twofold.objectives import OBJECTIVES, Statistic
from twofold.planning.settings import Planning
from twofold.task import Task


def centring_needs(recipe: Planning, task: Task | None) -> frozenset[Statistic]:
    """Return what is collected beside the objective's moments: the means, also where ``never`` does without, for the next run."""
    wanted = (
        recipe.centre == "always" or (task is not None and task.centred) or OBJECTIVES.get(recipe.objective).centred
    )
    return frozenset({"bias_mean"}) if wanted and _possible(recipe) is None else frozenset()


def mark_centred(targets: Targets, recipe: Planning, task: Task | None) -> Targets:
    """Mark the targets whose inputs are centred: those with a bias, where a recipe has it so."""
    if not centring_needs(recipe, task) or recipe.centre == "never":
        return targets
    return replace(targets, targets=[replace(target, centred=target.bias) for target in targets.targets])


def centre_notes(targets: Targets, recipe: Planning) -> list[str]:
    """Say what centring does, or why it is not done where it is asked for."""
    count = sum(target.centred for target in targets.targets)
    if count:
        return [
            f"{count} of the {len(targets.targets)} weights stand beside a bias, which takes up the mean of the inputs when the "
            "weight is factorized; so their losses are those of inputs without their mean"
        ]
    if recipe.centre != "always":
        return []
    return [f"`centre=always` changes nothing: {_possible(recipe) or 'no weight that is factorized has a bias'}"]


def _possible(recipe: Planning) -> str | None:
    """Say why a recipe can't centre inputs; None if it can."""
    if not OBJECTIVES.get(recipe.objective).centres:
        return f"`objective={recipe.objective}` has no second moments of the inputs as its metric"
    if recipe.bits is not None or recipe.kept_bits is not None:
        return "the losses of integers are those of inputs as they are"
    return None
