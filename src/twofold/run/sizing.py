"""The smallest model that meets a goal, found on the model itself: plan, factor, measure, and put the dense layers back."""

from __future__ import annotations

import hashlib
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from twofold.calibrate.opened import Opened
from twofold.errors import TwofoldError
from twofold.evaluation.reference import DenseReference
from twofold.factor.integers import rest_names
from twofold.factor.prepared import Prepared
from twofold.host.progress import say
from twofold.host.unfinished import Work
from twofold.model.frozen import evaluating
from twofold.nn.places import dense_again, put_back
from twofold.planning.make import least_keep, make_plan
from twofold.planning.plan import Plan
from twofold.recipe import Recipe
from twofold.report.record import Probe
from twofold.run.search import TOLERANCE, smallest
from twofold.task import Data, Samples, Task
from twofold.task.output.quality import Quality

STEPS = 9  # halvings of the share when the plan's prediction is inverted; they measure nothing


def samples_to_measure(evaluation: Samples | None, data: Data | None, recipe: Recipe) -> tuple[Samples | None, str]:
    """Return the samples to measure on and where they are from: the evaluation text, or else held-out calibration text."""
    if evaluation is None and data is not None and len(data.held_out):
        return data.to_measure(recipe.eval_windows), f"held-out {data.samples.source}"
    return evaluation, Path(recipe.eval_text or "").name


def gives_nothing(task: Task | None) -> str:
    """Say that a model gives no outputs of its task."""
    if task is None or task.fallback:
        return "this model gives no logits over its vocabulary"
    return f"this model gives no outputs of the task {task.name}"


class Sizing:
    """The search for the size of one run. ``begin`` comes before the calibration, ``find`` after the decompositions."""

    def __init__(self, opened: Opened, recipe: Recipe, *, quiet: bool) -> None:
        assert recipe.goal is not None
        self.loaded, self.task = opened.loaded, opened.need_task("measured")
        self.recipe, self.goal, self.quiet = recipe, recipe.goal, quiet
        self.evaluation = self.task.measured(self.loaded, recipe)
        self.probes: list[Probe] = []
        self._plans: dict[float, Plan] = {}

    def begin(self, data: Data | None, hashed: str, work: Work | None) -> None:
        """Choose the samples to measure on, and measure the dense model.

        Args:
            data: to calibrate on; some of it was held out.
            hashed: the hash of the model's configuration and weights.
            work: the unfinished state of the run, which keeps what was measured; in a temporary folder if it is None.

        Raises:
            TwofoldError: if there is nothing to measure on, or not even the dense model meets the goal.
        """
        samples, self.source = samples_to_measure(self.evaluation, data, self.recipe)
        if samples is None:
            text, a, one = ("text", "a text", "one") if self.task.streams else ("data", "data", "some")
            raise TwofoldError(
                f"{self.goal.setting} needs {a} to measure on, and no calibration {text} is left over for it; "
                f"give more {text}, or name {one} with `eval_text=FILE`"
            )
        if not self.task.predicts(self.loaded.model, samples):
            raise TwofoldError(
                f"{self.goal.setting} can't be measured: {gives_nothing(self.task)}; give `keep` or `budget`"
            )
        self.samples, self.work = samples, work
        self._known: dict[str, dict[str, float | int | None]] = {}
        if work is not None:
            self._known |= work.state.measured
            work.update(stage="measuring the original")
            folder = work.folder / "reference"
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="twofold-")  # removed with the search
            folder = Path(self._temporary.name)
        with evaluating(self.loaded.model), torch.no_grad():
            residence = self.loaded.residence
            mark = f"{hashed} {residence.dtype} {residence.device}"
            self.reference = DenseReference(self._predict, samples, self.task, folder, mark, quiet=self.quiet)
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
        """Search for the smallest plan that meets the goal, and prepare it in the place of the whole one.

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
                f"{self._numbers(best)}; allow more"
            )
        keep = min(probe.keep for probe in met)
        prepared.plan = self._plan(keep)
        prepared.plan.notes += self._notes(keep)

    def _notes(self, keep: float) -> list[str]:
        measured = "; ".join(f"keep {p.keep:.4f}: {self._numbers(p)}{', met' if p.met else ''}" for p in self.probes)
        notes = [
            f"the size was searched for {self._wanted}, measured on {self.source}, {self.samples.words}: keep {keep:.4f} is the "
            f"smallest that meets it, to {TOLERANCE:g}",
            f"measured in the search: {measured}",
        ]
        if keep == self._least:
            notes.append("the goal is met by the smallest model that these settings allow")
        if self.recipe.refine:
            notes.append("the goal was met before the refinement, which came after and kept the size")
        return notes

    def _plan(self, keep: float) -> Plan:
        """Plan at a share, once."""
        if keep not in self._plans:
            prepared, recipe = self.prepared, self.recipe.at(keep)
            name, element = self.loaded.name, self.loaded.stored_dtype.itemsize
            values, evidence = prepared.spectra.values, prepared.evidence
            self._plans[keep] = make_plan(name, prepared.targets, values, recipe, element, evidence)
        return self._plans[keep]

    def _probe(self, keep: float) -> Probe:
        """Measure the model at a share, unless this run, or the one that it goes on from, has measured the same plan."""
        plan = self._plan(keep)
        entries = plan.model_dump_json(include={"entries", "dense"})
        key = hashlib.sha256(f"{self.prepared.spectra.mark} {self.reference.mark} {entries}".encode()).hexdigest()
        if key not in self._known:
            self._known[key] = asdict(self._measure(plan))
            if self.work is not None:
                self.work.update(measured=self._known)
        quality = Quality(**self._known[key])  # type: ignore[arg-type]
        perplexity, divergence = finite(quality.perplexity), finite(quality.divergence)
        met = self.goal.met(self.dense, quality)
        probe = Probe(keep=keep, kept=plan.keep, perplexity=perplexity, divergence=divergence, met=met)
        if not self.quiet:
            say(f"keep {keep:.4f}: {self._numbers(probe)}: {'met' if met else 'not met'} ({self._wanted})")
        return probe

    def _measure(self, plan: Plan) -> Quality:
        """Factor the model by a plan, measure it, and give it its dense layers back."""
        model = self.loaded.model
        places = [target.name for target in self.prepared.targets.targets] + rest_names(plan, model)
        with put_back(model, places), evaluating(model), torch.no_grad():
            _, replaced = self.prepared.apply(plan, quiet=self.quiet)
            original = dense_again(model, replaced)(self._predict)
            return self.reference.measure(self._predict, original, quiet=self.quiet)

    def _estimate(self, probes: list[Probe]) -> float | None:
        """Return where the plan's predicted divergence fills the room of the goal, scaled as the last probe measured it."""
        room = self.goal.room(self.dense)
        if self._predicted(1.0) is None or room <= 0:
            return None
        scale = 1.0
        if probes:
            last = probes[-1]
            predicted = self._predicted(last.keep) or 0.0
            measured = self.goal.of(last)
            if measured is None or predicted <= 0:
                return None
            distance = self.goal.distance(self.dense, measured)
            if distance <= 0:
                return None
            scale = distance / predicted

        def exceeds(keep: float) -> bool:
            return scale * (self._predicted(keep) or 0.0) > room

        if not exceeds(self._least):
            return self._least
        low, high = self._least, 1.0
        for _ in range(STEPS):
            middle = round((low + high) / 2, 4)
            if exceeds(middle):
                low = middle
            else:
                high = middle
        return high

    @property
    def _wanted(self) -> str:
        """What the goal asks of the measured numbers, in words."""
        return self.goal.words(self.dense, self.task.prediction)

    def _numbers(self, probe: Probe) -> str:
        """Say what was measured."""
        numbers = {"perplexity": probe.perplexity} if self.task.perplexity else {}
        numbers["divergence"] = probe.divergence
        if None in numbers.values():
            return f"no finite {next(iter(numbers))}"
        return ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())

    def _predicted(self, keep: float) -> float | None:
        return self._plan(keep).predicted_divergence

    def _predict(self, i: int) -> Tensor:
        return self.task.outputs(self.loaded.model, self.samples.batch(i, i + 1))


def finite(number: float | None) -> float | None:
    """Return None in the place of a number that is not finite."""
    return number if number is not None and math.isfinite(number) else None
