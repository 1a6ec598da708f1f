"""All that stands before the factors, and how they are made of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from twofold.calibrate.moments import Moments
from twofold.calibrate.opened import Opened
from twofold.decompose.decompose import Decomposition
from twofold.decompose.spectra import Spectra
from twofold.factor.apply import apply_plan
from twofold.model.load import LoadedModel
from twofold.model.target import Targets
from twofold.objectives import Objective
from twofold.planning.evidence import Evidence
from twofold.planning.menu import PlanRequest
from twofold.planning.plan import Plan
from twofold.planning.settings import Planning
from twofold.task import Data


@dataclass
class Prepared:
    """All that stands before the factors: the model, its targets, moments, spectra and the plan."""

    opened: Opened
    targets: Targets
    data: Data | None
    reused: bool  # whether the moments are those of an earlier run
    decomposition: Decomposition
    evidence: Evidence
    plan: Plan

    @property
    def loaded(self) -> LoadedModel:
        return self.opened.loaded

    @property
    def objective(self) -> Objective:
        return self.decomposition.objective

    @property
    def moments(self) -> Moments | None:
        return self.decomposition.moments

    @property
    def spectra(self) -> Spectra:
        return self.decomposition.spectra

    def request(self, recipe: Planning) -> PlanRequest:
        """Return what was planned, with the share that was found in the place of a goal."""
        element = self.loaded.stored_dtype.itemsize
        return PlanRequest(self.targets, self.spectra.values, recipe.at(self.plan.keep), element, self.evidence)

    def apply(self, plan: Plan, *, quiet: bool = False) -> tuple[Plan, dict[str, nn.Module]]:
        """Put the factored layers of a plan in the place of the dense ones of a model in memory.

        Returns:
            The plan as it was carried out, and the dense modules that were replaced.
        """
        stored, structures = self.loaded.stored_dtype, self.targets.structures
        return apply_plan(self.loaded.model, plan, self.decomposition, stored, structures=structures, quiet=quiet)

    def factorize(self, *, quiet: bool = False) -> dict[str, nn.Module]:
        """Factorize the model, which is in memory, by its plan; the plan becomes what was carried out.

        Returns:
            The dense modules that were replaced.
        """
        self.plan, replaced = self.apply(self.plan, quiet=quiet)
        return replaced
