"""A budget in time: what the targeted weights may take for one token, as measured on this machine (``speed.latency``)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from twofold.allocate import Candidate
from twofold.errors import TwofoldError
from twofold.inference.latency import LayerTimes
from twofold.planning.evidence import Evidence


def in_time(candidate: Candidate, evidence: Evidence) -> Candidate:
    """The same choices at what they cost in microseconds."""
    times = evidence.times[candidate.name]
    return replace(candidate, costs=times.at(candidate.ranks), dense_cost=times.dense, full_cost=times.dense)


def time_budget(latency: float, candidates: list[Candidate], least: float) -> float:
    """The microseconds that all weights may take.

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
    return latency * dense


def time_note(latency: float, candidates: list[Candidate], evidence: Evidence) -> str:
    """What a budget in time is, in words."""
    dense = sum(candidate.full_cost for candidate in candidates)
    slower = sum(bool((candidate.costs >= candidate.full_cost).all()) for candidate in candidates)
    never = f"; {slower} weights are slower at every rank than dense ones, and stay dense" if slower else ""
    return (
        f"the budget is {latency:g} of the {dense:,.0f} µs that the dense weights take for one token, measured on "
        f"{evidence.times_of}; what weights that share an input gain together is not counted{never}"
    )


def timed(rank: int | None, times: LayerTimes, candidate: Candidate) -> dict[str, float | str]:
    """What an entry of a plan says of its measured time; one that is dense since it would be slower says that too.

    Args:
        candidate: with its costs in time.
    """
    if rank is not None:
        return {"microseconds": float(times.at(np.array([rank]))[0]), "dense_microseconds": times.dense}
    update: dict[str, float | str] = {"microseconds": times.dense, "dense_microseconds": times.dense}
    if candidate.costs.min() >= times.dense:
        update["reason"] = (
            f"dense: measured slower at every rank ({candidate.costs[0]:.0f} µs at rank {candidate.ranks[0]}, dense "
            f"{times.dense:.0f} µs)"
        )
    return update
