"""The weights of a plan summed by kind and by layer, and what their losses mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofold.linalg.gauge import gauge_rank
from twofold.model.stacks import stack_labels, stack_words
from twofold.nn.layers.corrected import CorrectedLinear
from twofold.nn.layers.sliced import SlicedLinear
from twofold.planning.plan import Plan, PlanEntry
from twofold.report.formats import fraction
from twofold.report.messages import ENGLISH, Words

SpectraValues = Mapping[str, NDArray[Any]]  # σ² (k,) by weight, largest first


@dataclass(frozen=True)
class LossScale:
    """How the losses Σσ² of a plan are shown."""

    known: bool  # every weight has one
    additive: bool  # one scale for all weights, so that losses may be summed
    factor: float  # from Σσ² to what is shown
    unit: str


def loss_of(plan: Plan, words: Words = ENGLISH) -> LossScale:
    """Return how losses are shown: half of Σσ² is in nats where the objective says so; others have no common scale."""
    known = bool(plan.entries) and all(e.predicted_loss is not None and e.total_loss is not None for e in plan.entries)
    nats = plan.loss_unit == "nats"
    unit = words.nats(plan.prediction) if nats else words.say(f"unit.{plan.loss_unit}")
    return LossScale(known, nats, 0.5 if nats else 1.0, unit)


@dataclass(frozen=True)
class Group:
    """Some weights, and their sums."""

    label: str
    entries: list[PlanEntry]
    before: int  # stored numbers
    after: int
    lost: float  # of the predicted losses, as in the plan
    total: float  # of what there is to lose

    @property
    def keep(self) -> float:
        """The share that they keep."""
        return fraction(self.after, self.before)

    def shown(self, loss: LossScale) -> float:
        """Return the predicted loss where losses may be summed, else the share of the group's own total that is left out."""
        return loss.factor * self.lost if loss.additive else self.lost / self.total if self.total else 0.0


def kind_labels(plan: Plan) -> dict[str, str]:
    """Return for each weight the label of its kind: the last part of its name, or as many parts as tell its role from others.

    A role is a name without its numbers: in BERT the kind "dense" has three. Where a model has several stacks, the label begins
    with that of the stack; the stages of one are told apart by their blocks alone.
    """
    stacks = stack_words(stacks_in(plan))
    roles = {e.name: _without_numbers(e.name.removeprefix(f"{e.stack}.") if e.stack else e.name) for e in plan.entries}
    distinct: dict[tuple[str, str], set[str]] = {}
    for entry in plan.entries:
        distinct.setdefault((stacks.get(entry.stack or "", ""), entry.kind), set()).add(roles[entry.name])
    labels = {}
    for entry in plan.entries:
        stack = stacks.get(entry.stack or "", "")
        others = distinct[stack, entry.kind] - {roles[entry.name]}
        parts = roles[entry.name].split(".")
        ends = [".".join(parts[-size:]) for size in range(1, len(parts) + 1)]
        alone = (end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))
        labels[entry.name] = f"{stack} {next(alone, ends[-1]) if others else entry.kind}".strip()
    return labels


def stacks_in(plan: Plan) -> list[str]:
    """Return the stacks of a plan that tells several apart, in the order of the model."""
    return list(dict.fromkeys(entry.stack for entry in plan.entries if entry.stack))


def _without_numbers(name: str) -> str:
    return re.sub(r"(?:(?<=\.)|^)\d+(?:\.|$)", "", name).rstrip(".")


def depths(entries: Iterable[PlanEntry]) -> dict[str, float]:
    """Return how deep each of some weights stands in its stack, from 0 to 1, the deepest of them."""
    entries, deepest = list(entries), dict[str | None, int]()
    for entry in entries:
        deepest[entry.stack] = max(deepest.get(entry.stack, 1), entry.layer or 0)
    return {entry.name: (entry.layer or 0) / deepest[entry.stack] for entry in entries}


def _grouped(plan: Plan, label: Callable[[PlanEntry], str]) -> list[Group]:
    groups: dict[str, list[PlanEntry]] = {}
    for entry in plan.entries:
        groups.setdefault(label(entry), []).append(entry)
    summed = ("numbers_before", "numbers_after", "predicted_loss", "total_loss")
    return [
        Group(name, entries, *(sum(getattr(entry, field) or 0 for entry in entries) for field in summed))
        for name, entries in groups.items()
    ]


def by_kind(plan: Plan) -> list[Group]:
    """Return the weights of each kind, in the order of the model."""
    labels = kind_labels(plan)
    return _grouped(plan, lambda entry: labels[entry.name])


def made_of(plan: Plan, words: Words = ENGLISH) -> str:
    """Say what became of the weights that are smaller now."""
    forms = {entry.form for entry in plan.entries}
    if any(entry.basis is not None for entry in plan.entries):
        return words.say("form.shared")
    if forms.intersection(CorrectedLinear.FORMS):
        return words.say("form.corrected")
    if forms.intersection(SlicedLinear.FORMS):
        return words.say("form.sliced")
    return words.say("form.two")


def by_layer(plan: Plan) -> list[Group]:
    """Return the weights of each layer, from first to last, stack after stack; those outside of the layers come last."""
    stacks = stack_labels(stacks_in(plan))

    def label(entry: PlanEntry) -> str:
        stack = stacks.get(entry.stack or "", "")
        between = "" if not stack else "." if stack[-1].isdigit() else " "  # 0.1 is the second block of the first stage
        return "none" if entry.layer is None else f"{stack}{between}{entry.layer}"

    def place(group: Group) -> float:
        layer = group.entries[0].layer
        return float("inf") if layer is None else 0 if stacks else layer  # several stacks: in the order of the model

    return sorted(_grouped(plan, label), key=place)


def loss_at_share(entries: list[PlanEntry], spectra: SpectraValues, keep: float, plain: bool) -> float | None:
    """Return the loss Σσ² if each of these weights kept the same share of its parameters; None without all the spectra."""
    lost = 0.0
    for entry in entries:
        values = spectra.get(entry.name)
        if values is None:
            return None
        m, n = entry.out_features, entry.in_features
        rank = int(keep * m * n / (m + n)) if plain else gauge_rank(m, n, keep * m * n)
        lost += float(np.asarray(values, dtype=np.float64)[max(rank, 1) :].sum())
    return lost


def energy_rank(entries: list[PlanEntry], spectra: SpectraValues, part: float = 0.99) -> float | None:
    """Return the mean share of the ranks that hold ``part`` of Σσ²: small for a steep spectrum, near it for a flat one."""
    shares = []
    for entry in entries:
        values = np.asarray(spectra.get(entry.name, ()), dtype=np.float64)
        if len(values) and values.sum() > 0:
            needed = int(np.searchsorted(np.cumsum(values), part * values.sum())) + 1
            shares.append(min(needed, len(values)) / len(values))
    return float(np.mean(shares)) if shares else None
