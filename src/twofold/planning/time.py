"""A budget in time: what the targeted weights may take for one token, as measured on this machine (``speed.latency``)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from twofold.allocate import Candidate
from twofold.errors import TwofoldError
from twofold.planning.evidence import Evidence
from twofold.planning.plan import PlanEntry


def in_time(candidate: Candidate, evidence: Evidence) -> Candidate:
    """Return a candidate whose choices cost microseconds."""
    times = evidence.times[candidate.name]
    return replace(candidate, costs=times.at(candidate.ranks), dense_cost=times.dense, full_cost=times.dense)


def time_budget(latency: float, candidates: list[Candidate], least: float, evidence: Evidence) -> tuple[float, str]:
    """Return the microseconds that all weights may take, and a note that says so.

    Args:
        latency: share of the dense weights' time.
        least: microseconds of the fastest choices.

    Raises:
        TwofoldError: if no choice of ranks takes so little; it says the smallest share.
    """
    dense = sum(candidate.full_cost for candidate in candidates)
    if latency * dense < least:
        smallest = math.ceil(1e3 * least / dense) / 1e3
        raise TwofoldError(
            f"`latency={latency:g}` can't be met on this machine: the smallest possible is {smallest:g} of the time of the "
            "dense layers; allow more"
        )
    slower = sum(bool((candidate.costs >= candidate.full_cost).all()) for candidate in candidates)
    never = f"; {slower} weights are slower at every rank than dense ones, and stay dense" if slower else ""
    return latency * dense, (
        f"the budget is {latency:g} of the {dense:,.0f} µs that the dense weights take for one token, measured on "
        f"{evidence.times_of}; what weights that share an input gain together is not counted{never}"
    )


def timed(entry: PlanEntry, candidate: Candidate, evidence: Evidence) -> PlanEntry:
    """Return an entry with its measured time; one that is dense since it would be slower says that too.

    Args:
        candidate: with its costs in time.
    """
    times = evidence.times[entry.name]
    now = times.dense if entry.rank is None else float(times.at(np.array([entry.rank]))[0])
    reason = entry.reason
    if entry.rank is None and candidate.costs.min() >= times.dense:
        reason = (
            f"dense: measured slower at every rank ({candidate.costs[0]:.0f} µs at rank {candidate.ranks[0]}, dense "
            f"{times.dense:.0f} µs)"
        )
    return entry.model_copy(update={"microseconds": now, "dense_microseconds": times.dense, "reason": reason})
