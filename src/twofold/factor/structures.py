"""Structures cut to the sizes of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from twofold.decompose.decompose import Decomposition
from twofold.factor.outcome import PLAIN, Outcome, carried_out
from twofold.host.progress import Tick
from twofold.model.structure import Structure
from twofold.nn.compact import CompactLinear
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.shared import SharedLinear
from twofold.planning.plan import PlanEntry
from twofold.structures.cut import prepare_cut
from twofold.structures.units import even_shares


def cut_entries(
    model: nn.Module,
    entries: Iterable[PlanEntry],
    structures: Sequence[Structure],
    decomposition: Decomposition,
    stored: torch.dtype,
    tick: Tick,
) -> Iterator[Outcome]:
    """Cut structures of a model that is in memory, one after another."""
    assert decomposition.moments is not None
    by_name = {entry.name: entry for entry in entries}
    for structure in structures:
        rank = by_name[structure.name].rank
        if rank is not None:
            cut = prepare_cut(structure, model, decomposition.moments, decomposition.damping)
            layers, measured = cut.layers(rank // structure.members[-1].per_unit, stored)
            for i, member in enumerate(structure.members):
                if member.name in layers:
                    yield _outcome(structure, i, by_name[member.name], layers[member.name], measured)
        tick(len(structure.members))


def _outcome(structure: Structure, place: int, entry: PlanEntry, layer: CompactLinear, measured: float) -> Outcome:
    """Return the outcome for a member.

    Args:
        place: of the member in its structure; the losses stand with the last one.
    """
    loss = measured if place == len(structure.members) - 1 else 0.0
    update: dict[str, Any] = {"measured_loss": loss}
    if isinstance(layer, SharedLinear):
        share = even_shares(layer.basis.numbers, len(structure.members))[place]
        update |= {"rank": layer.rank, "form": layer.form, "numbers_after": layer.numbers + share}
    elif isinstance(layer, FactoredLinear):  # the plan says how much it may store
        columns = layer.columns if isinstance(layer, DenseColumnsLinear) else 0
        update |= {"rank": layer.rank, "form": layer.form, "columns": columns, "numbers_after": layer.numbers}
    if layer.form in PLAIN and entry.form not in PLAIN:
        update["predicted_loss"] = loss
    return carried_out(layer, entry, update)
