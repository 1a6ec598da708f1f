"""All that stands before the factors, and how they are made of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from twofold.calibrate.moments import Moments
from twofold.decompose.spectra import Spectra
from twofold.factor.apply import apply_plan
from twofold.model.load import LoadedModel
from twofold.model.weights import Targets
from twofold.objectives.base import Objective
from twofold.planning.evidence.base import Evidence
from twofold.planning.plan import Plan
from twofold.settings.recipe import Recipe
from twofold.task.texts import TokenWindows


@dataclass
class Prepared:
    """All that stands before the factors: the model, its targets, moments, spectra and the plan."""

    loaded: LoadedModel
    targets: Targets
    objective: Objective
    windows: TokenWindows | None
    moments: Moments | None
    reused: bool
    spectra: Spectra
    evidence: Evidence
    plan: Plan


def carry_out(prepared: Prepared, recipe: Recipe, *, quiet: bool = False) -> dict[str, nn.Module]:
    """Factorize a model in memory by its plan; gives the dense modules that were replaced."""
    prepared.plan, replaced = apply_plan(
        prepared.loaded.model,
        prepared.plan,
        prepared.spectra,
        prepared.moments,
        prepared.objective,
        recipe.damping,
        prepared.loaded.stored_dtype,
        structures=prepared.targets.structures,
        quiet=quiet,
    )
    return replaced
