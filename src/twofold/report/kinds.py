"""The weights of a plan summed by kind and by layer, and what their losses mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofold.linalg.gauge import gauge_rank
from twofold.planning.plan import Plan, PlanEntry
from twofold.report.formats import share

Spectra = Mapping[str, NDArray[Any]]  # σ² (k,) by weight, largest first


@dataclass(frozen=True)
class Loss:
    """How the losses Σσ² of a plan are shown."""

    known: bool  # every weight has one
    additive: bool  # one scale for all weights, so that losses may be summed
    factor: float  # from Σσ² to what is shown
    unit: str


UNITS = {"nats": "nats per token", "output": "energy of the output", "weight": "energy of the weight"}


def loss_of(plan: Plan) -> Loss:
    """Half of Σσ² is in nats per token with the two-sided objective; other objectives have no common scale."""
    known = bool(plan.entries) and all(e.predicted_loss is not None and e.total_loss is not None for e in plan.entries)
    nats = plan.loss_unit == "nats"
    return Loss(known, nats, 0.5 if nats else 1.0, UNITS.get(plan.loss_unit, plan.loss_unit))


@dataclass(frozen=True)
class Group:
    """Some weights, and their sums."""

    label: str
    entries: list[PlanEntry]

    @property
    def before(self) -> int:
        return sum(entry.numbers_before for entry in self.entries)

    @property
    def after(self) -> int:
        return sum(entry.numbers_after for entry in self.entries)

    @property
    def keep(self) -> float:
        return share(self.after, self.before)

    @property
    def lost(self) -> float:
        """Σ of the predicted losses, as in the plan."""
        return sum(entry.predicted_loss or 0.0 for entry in self.entries)

    @property
    def total(self) -> float:
        """Σ of what there is to lose."""
        return sum(entry.total_loss or 0.0 for entry in self.entries)

    def shown(self, loss: Loss) -> float:
        """The predicted loss where losses may be summed, else the share of the group's own total that is left out."""
        return loss.factor * self.lost if loss.additive else self.lost / self.total if self.total else 0.0


def kind_labels(plan: Plan) -> dict[str, str]:
    """For each weight the label of its kind: the last part of its name, or as many parts as tell its role from others.

    A role is a name without its numbers: in BERT the kind "dense" has three.
    """
    roles = {entry.name: re.sub(r"(?:(?<=\.)|^)\d+(?:\.|$)", "", entry.name).rstrip(".") for entry in plan.entries}
    distinct: dict[str, set[str]] = {}
    for entry in plan.entries:
        distinct.setdefault(entry.kind, set()).add(roles[entry.name])
    labels = {}
    for entry in plan.entries:
        others = distinct[entry.kind] - {roles[entry.name]}
        parts = roles[entry.name].split(".")
        for size in range(1, len(parts) + 1):
            label = ".".join(parts[-size:])
            if not any(other == label or other.endswith(f".{label}") for other in others):
                break
        labels[entry.name] = label if others else entry.kind
    return labels


def _grouped(plan: Plan, label: Callable[[PlanEntry], str]) -> list[Group]:
    groups: dict[str, list[PlanEntry]] = {}
    for entry in plan.entries:
        groups.setdefault(label(entry), []).append(entry)
    return [Group(name, entries) for name, entries in groups.items()]


def by_kind(plan: Plan) -> list[Group]:
    """The weights of each kind, in the order of the model."""
    labels = kind_labels(plan)
    return _grouped(plan, lambda entry: labels[entry.name])


def made_of(plan: Plan) -> str:
    """What became of the weights that are smaller now."""
    sliced = any(entry.form in ("kept-rows", "kept-columns") for entry in plan.entries)
    if any(entry.basis is not None for entry in plan.entries):
        return "products of two smaller ones, one of which serves several blocks"
    if any(entry.form == "corrected" for entry in plan.entries):
        return "integers of the whole weight with a correction of low rank"
    return "smaller dense ones, with some of their rows or columns" if sliced else "products of two smaller ones"


def layer_label(layer: int | None) -> str:
    return "none" if layer is None else str(layer)


def by_layer(plan: Plan) -> list[Group]:
    """The weights of each layer, from first to last; those outside of the layers come last."""
    groups = _grouped(plan, lambda entry: layer_label(entry.layer))
    return sorted(groups, key=lambda g: float("inf") if g.entries[0].layer is None else g.entries[0].layer)


def loss_at_share(entries: list[PlanEntry], spectra: Spectra, keep: float, plain: bool) -> float | None:
    """The loss Σσ² if each of these weights kept the same share of its parameters; None without all the spectra."""
    lost = 0.0
    for entry in entries:
        values = spectra.get(entry.name)
        if values is None:
            return None
        m, n = entry.out_features, entry.in_features
        rank = int(keep * m * n / (m + n)) if plain else gauge_rank(m, n, keep * m * n)
        lost += float(np.asarray(values, dtype=np.float64)[max(rank, 1) :].sum())
    return lost


def spread(entries: list[PlanEntry], spectra: Spectra, part: float = 0.99) -> float | None:
    """The mean share of the ranks that hold ``part`` of Σσ²: small for a steep spectrum, near it for a flat one."""
    shares = []
    for entry in entries:
        values = np.asarray(spectra.get(entry.name, ()), dtype=np.float64)
        if len(values) and values.sum() > 0:
            needed = int(np.searchsorted(np.cumsum(values), part * values.sum())) + 1
            shares.append(min(needed, len(values)) / len(values))
    return float(np.mean(shares)) if shares else None
