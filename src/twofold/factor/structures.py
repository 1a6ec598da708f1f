"""Structures measured at every size, and cut to the sizes of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from twofold.calibrate.moments import Moments
from twofold.host.progress import Tick
from twofold.model.structure import Structure
from twofold.nn.compact import CompactLinear
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.shared import SharedLinear
from twofold.planning.plan import PlanEntry
from twofold.structures.cut import prepare
from twofold.structures.units import even_shares


def cut_entries(
    model: nn.Module,
    entries: Iterable[PlanEntry],
    structures: Sequence[Structure],
    moments: Moments,
    damping: float,
    stored: torch.dtype,
    tick: Tick,
) -> Iterator[tuple[PlanEntry, CompactLinear | None, str | None]]:
    """Cut structures of a model that is in memory, one after another; gives their entries as they were carried out."""
    by_name = {entry.name: entry for entry in entries}
    for structure in structures:
        rank = by_name[structure.name].rank
        made: Mapping[str, CompactLinear] = {}
        measured = 0.0
        if rank is not None:
            cut = prepare(structure, model, moments, damping)
            made, measured = cut.layers(rank // structure.members[-1].per_unit, stored)
        for i, member in enumerate(structure.members):
            entry, layer, note = by_name[member.name], made.get(member.name), None
            if layer is not None:
                entry, note = _carried_out(structure, i, entry, layer, measured)
            yield entry, layer, note
            tick()


def _carried_out(
    structure: Structure, place: int, entry: PlanEntry, layer: CompactLinear, measured: float
) -> tuple[PlanEntry, str | None]:
    """The entry of a member as it became, and a note where the gauge form had to give way.

    Args:
        place: of the member in its structure; the losses stand with the last one.
    """
    last = place == len(structure.members) - 1
    update: dict[str, Any] = {"measured_loss": measured if last else 0.0}
    if isinstance(layer, SharedLinear):
        share = even_shares(layer.basis.numbers, len(structure.members))[place]
        update |= {"rank": layer.rank, "form": layer.form, "numbers_after": layer.numbers + share}
    elif isinstance(layer, FactoredLinear):  # the plan says how much it may store
        columns = layer.columns if isinstance(layer, DenseColumnsLinear) else 0
        update |= {"rank": layer.rank, "form": layer.form, "columns": columns, "numbers_after": layer.numbers}
    note = None
    if (entry.form, layer.form) in (("gauge", "plain"), ("shared-columns", "shared-plain")):
        dense = f" and {update['columns']} dense columns" if update.get("columns") else ""
        note = (
            f"{entry.name}: no bounded gauge form, so plain factors of rank {update['rank']}{dense} take the place of rank "
            f"{entry.rank}"
        )
        update |= {
            "predicted_loss": measured if last else 0.0,
            "reason": f"{entry.reason}; plain factors, no bounded gauge form",
        }
    return entry.model_copy(update=update), note
