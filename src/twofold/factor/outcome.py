"""What becomes of an entry of the plan: its layer, and plain factors of less rank where no gauge form is bounded."""

from __future__ import annotations

from typing import Any, NamedTuple

from twofold.linalg.gauge import rank_numbers
from twofold.linalg.spectrum import Spectrum
from twofold.nn.compact import CompactLinear
from twofold.planning.plan import PlanEntry

PLAIN = ("plain", "shared-plain")


class Outcome(NamedTuple):
    """One weight after the plan has been carried out."""

    layer: CompactLinear
    entry: PlanEntry  # as it was carried out
    note: str | None  # if the gauge form gave way


def plain_update(entry: PlanEntry, spectrum: Spectrum) -> dict[str, Any]:
    """Return what an entry becomes with plain factors that store no more than its own."""
    rank = max(entry.numbers_after // (entry.out_features + entry.in_features), 1)
    numbers, loss = rank_numbers("plain", entry, rank), float(spectrum.tails[rank])
    return {"rank": rank, "form": "plain", "numbers_after": numbers, "predicted_loss": loss}


def carried_out(layer: CompactLinear, entry: PlanEntry, update: dict[str, Any]) -> Outcome:
    """Return the outcome for an entry and what has changed of it; if plain factors stand in for a gauge form, it says so."""
    note = None
    if layer.form in PLAIN and entry.form not in PLAIN:
        beside = f" and {update['columns']} dense columns" if update.get("columns") else ""
        note = (
            f"{entry.name}: no bounded gauge form, so plain factors of rank {update['rank']}{beside} take the place of rank "
            f"{entry.rank}"
        )
        reason = f"{entry.reason}; plain factors, since the gauge form had no bounded coefficients"
        update = {**update, "reason": reason}
    return Outcome(layer, entry.model_copy(update=update), note)
