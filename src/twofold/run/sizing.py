"""The smallest model that meets a goal, found on the model itself: plan, factor, measure, and the dense layers come back."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.calibrate.opened import Opened
from twofold.errors import TwofoldError
from twofold.evaluation.reference import Reference
from twofold.factor.integers import rest_names
from twofold.factor.prepared import Prepared
from twofold.host.progress import say
from twofold.host.unfinished import Work
from twofold.nn.places import dense_again, put_back
from twofold.planning.make import least_keep, make_plan
from twofold.planning.plan import Plan
from twofold.recipe import Recipe
from twofold.report.record import Probe
from twofold.run.search import TOLERANCE, smallest
from twofold.task import Data, Samples
from twofold.task.output.quality import Quality

STEPS = 9  # halvings of the share when the plan's prediction is inverted; they measure nothing


class Sizing:
    """The search for the size of one run. ``begin`` comes before the calibration, ``find`` after the decompositions.

    Args:
        samples: of the evaluation text; without it, held-out calibration text decides.
        work: the unfinished state of the run, which keeps what was measured; in a temporary folder if it is None.
    """

    def __init__(
        self, opened: Opened, recipe: Recipe, samples: Samples | None, *, work: Work | None = None, quiet: bool
    ) -> None:
        assert recipe.goal is not None
        self.loaded, self.task = opened.loaded, opened.need_task("measured")
        self.recipe, self.goal = recipe, recipe.goal
        self.samples, self.source = samples, Path(recipe.eval_text or "").name
        self.work, self.quiet = work, quiet
        self._temporary = tempfile.TemporaryDirectory(prefix="twofold-") if work is None else None
        self._known: dict[str, dict[str, float | int | None]] = {} if work is None else dict(work.state.measured)
        self._plans: dict[float, Plan] = {}
        self.probes: list[Probe] = []

    def begin(self, calibration: Data | None, hashed: str) -> None:
        """Choose the samples to measure on, and measure the dense model.

        Args:
            hashed: the hash of its configuration and weights.

        Raises:
            TwofoldError: if there is nothing to measure on, or not even the dense model meets the goal.
        """
        if self.samples is None and calibration is not None and len(calibration.held_out):
            self.source = f"held-out {calibration.samples.source}"
            self.samples = calibration.held_out[: self.recipe.eval_windows]
        if self.samples is None:
            raise TwofoldError(
                f"{self.goal.setting} needs a text to measure on, and no calibration text is left over for it; "
                "give more text, or name one with `eval_text=FILE`"
            )
        if not self.task.predicts(self.loaded.model, self.samples):
            raise TwofoldError(
                f"{self.goal.setting} can't be measured: this model gives no logits over its vocabulary; give `keep` or `budget`"
            )
        if self.work is not None:
            self.work.update(stage="measuring the original")
            folder = self.work.folder / "reference"
        else:
            assert self._temporary is not None
            folder = Path(self._temporary.name)
        with _as_measured(self.loaded.model):
            residence = self.loaded.residence
            mark = f"{hashed} {residence.dtype} {residence.device}"
            self.reference = Reference(self._predict, self.samples, self.task, folder, mark, quiet=self.quiet)
        if not self.goal.met(self.dense, replace(self.dense, divergence=0.0)):
            raise TwofoldError(
                f"{self.goal.setting} can't be met: the dense model itself has a perplexity of {self.dense.perplexity:.4g} on "
                f"{self.source}; allow more than that, or a multiple of it, as in `perplexity_at_most=1.1x`"
            )

    @property
    def dense(self) -> Quality:
        """The quality of the dense model."""
        return self.reference.quality

    def find(self, prepared: Prepared) -> None:
        """Search for the smallest plan that meets the goal, and put it in the place of the one that was prepared.

        Raises:
            TwofoldError: if no model smaller than the dense one meets it.
        """
        self.prepared = prepared
        if self.work is not None:
            self.work.update(stage="searching for the size")
        self._least = least_keep(prepared.targets, prepared.spectra.values, self.recipe)
        self.probes = smallest(self._least, self._probe, self._estimate)
        met = [probe for probe in self.probes if probe.met]
        if not met:
            best = max(self.probes, key=lambda probe: probe.keep)
            raise TwofoldError(
                f"no model that is smaller by more than {TOLERANCE:.1%} meets {self.goal.setting}: keep {best.keep:.4g} gives "
                f"{_numbers(best)}; allow more"
            )
        chosen = min(met, key=lambda probe: probe.keep)
        prepared.plan = self._plan(chosen.keep)
        prepared.plan.notes += self._notes(chosen)

    def _notes(self, chosen: Probe) -> list[str]:
        assert self.samples is not None
        count, window = self.samples.shape
        measured = "; ".join(f"keep {one.keep:.4f}: {_numbers(one)}{', met' if one.met else ''}" for one in self.probes)
        notes = [
            f"the size was searched for {self.goal.words(self.dense)}, measured on {self.source}, {count} windows of {window} "
            f"tokens: keep {chosen.keep:.4f} is the smallest that meets it, to {TOLERANCE:g}",
            f"measured in the search: {measured}",
        ]
        if chosen.keep == self._least:
            notes.append("the goal is met by the smallest model that these settings allow")
        if self.recipe.refine:
            notes.append("the goal was met before the refinement, which came after and kept the size")
        return notes

    def _plan(self, keep: float) -> Plan:
        """The plan at a share."""
        if keep not in self._plans:
            found = self.prepared
            self._plans[keep] = make_plan(
                self.loaded.name,
                found.targets,
                found.spectra.values,
                self.recipe.at(keep),
                self.loaded.stored_dtype.itemsize,
                found.evidence,
            )
        return self._plans[keep]

    def _probe(self, keep: float) -> Probe:
        """Measure the model at a share; a plan that this run, or the one that it goes on from, has measured is not again."""
        plan = self._plan(keep)
        told = (
            f"{self.prepared.spectra.mark} {self.reference.mark} {plan.model_dump_json(include={'entries', 'dense'})}"
        )
        key = hashlib.sha256(told.encode()).hexdigest()
        if key not in self._known:
            self._known[key] = asdict(self._measure(plan))
            if self.work is not None:
                self.work.update(measured=self._known)
        found = Quality(**self._known[key])  # type: ignore[arg-type]
        probe = Probe(
            keep=keep,
            kept=plan.keep,
            perplexity=_finite(found.perplexity),
            divergence=_finite(found.divergence),
            met=self.goal.met(self.dense, found),
        )
        if not self.quiet:
            say(
                f"keep {keep:.4f}: {_numbers(probe)}: {'met' if probe.met else 'not met'} ({self.goal.words(self.dense)})"
            )
        return probe

    def _measure(self, plan: Plan) -> Quality:
        """Factor the model by a plan, measure it, and give it its dense layers back."""
        found, model = self.prepared, self.loaded.model
        places = [target.name for target in found.targets.targets] + rest_names(plan, model)
        with put_back(model, places), _as_measured(model):
            _, replaced = found.apply(plan, quiet=self.quiet)

            def original(i: int) -> Tensor:
                with dense_again(model, replaced):
                    return self._predict(i)

            return self.reference.measure(self._predict, original, quiet=self.quiet)

    def _estimate(self, probes: list[Probe]) -> float | None:
        """Where the plan's predicted divergence, scaled by what the last probe measured of it, is what the goal has room for."""
        room = self.goal.room(self.dense)
        if self._predicted(1.0) is None or room <= 0:
            return None
        scale = 1.0
        if probes:
            last = probes[-1]
            predicted = self._predicted(last.keep) or 0.0
            if last.perplexity is None or last.divergence is None or predicted <= 0:
                return None
            distance = self.goal.distance(self.dense, last.perplexity, last.divergence)
            if distance <= 0:
                return None
            scale = distance / predicted
        if scale * (self._predicted(self._least) or 0.0) <= room:
            return self._least
        low, high = self._least, 1.0
        for _ in range(STEPS):
            middle = round((low + high) / 2, 4)
            if scale * (self._predicted(middle) or 0.0) > room:
                low = middle
            else:
                high = middle
        return high

    def _predicted(self, keep: float) -> float | None:
        return self._plan(keep).predicted_divergence

    def _predict(self, i: int) -> Tensor:
        assert self.samples is not None
        return self.task.outputs(self.loaded.model, self.samples.batch(i, i + 1))


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _numbers(probe: Probe) -> str:
    """What was measured, in words."""
    if probe.perplexity is None or probe.divergence is None:
        return "no finite perplexity"
    return f"perplexity {probe.perplexity:.4g}, divergence {probe.divergence:.4g}"


@contextmanager
def _as_measured(model: Any) -> Iterator[None]:
    """Within the block the model runs as it will be used: without dropout, and without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def sizing_of(recipe: Recipe, opened: Opened, *, quiet: bool) -> Sizing | None:
    """Return the search for the size, if a quality is asked for in its place."""
    if recipe.goal is None:
        return None
    measured_on = opened.need_task("measured").measured(opened.loaded, recipe)
    return Sizing(opened, recipe, measured_on, quiet=quiet)
