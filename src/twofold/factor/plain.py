"""What stands in for a gauge form that would have no bounded coefficients: plain factors, of less rank in the same storage."""

from __future__ import annotations

from typing import Any

from twofold.linalg.spectrum import Spectrum
from twofold.linalg.storage import rank_numbers
from twofold.planning.plan import PlanEntry


def plain_rank(entry: PlanEntry) -> int:
    """Return the rank of plain factors that store no more than the entry's."""
    return max(entry.numbers_after // (entry.out_features + entry.in_features), 1)


def plain_update(entry: PlanEntry, spectrum: Spectrum) -> tuple[dict[str, Any], str]:
    """Return what the entry becomes with plain factors, and a note."""
    rank = plain_rank(entry)
    update = {
        "rank": rank,
        "form": "plain",
        "numbers_after": rank_numbers("plain", entry, rank),
        "predicted_loss": float(spectrum.tails[rank]),
        "reason": f"{entry.reason}; plain factors, since the gauge form had no bounded coefficients",
    }
    note = f"{entry.name}: no bounded gauge form, so plain factors of rank {rank} take the place of rank {entry.rank}"
    return update, note
