"""The smallest share to keep at which something still holds, closely bracketed in few probes, since each is a measurement."""

from __future__ import annotations

from collections.abc import Callable

from twofold.report.record import Probe

TOLERANCE = 0.005  # the width of the bracket in which the search ends, as a share of the factorized weights
ASIDE = 0.4 * TOLERANCE  # how far beside an estimate is probed, so that two probes around a good one end the search


def smallest(
    least: float, probe: Callable[[float], Probe], estimate: Callable[[list[Probe]], float | None]
) -> list[Probe]:
    """Search between the smallest possible share and the whole by bisection, for what is taken to hold from some share on.

    The whole is taken to hold, and is not probed. The answer is the probe of the smallest share that is met; unless it is that of
    ``least``, one that is not met lies within ``TOLERANCE`` below it.

    Args:
        least: the smallest possible share.
        probe: measures at a share.
        estimate: where the answer may be, from the probes so far; None for the middle. After two estimates that have not
            halved the bracket comes the middle, however sure they are.

    Returns:
        The probes in order; none is met if nothing below the whole is.
    """
    probes: list[Probe] = []
    low, high = least, 1.0
    failed, slow = False, 0  # whether the lower end is known to fail; probes that have not halved the bracket
    while high - low > TOLERANCE or not failed:
        width = high - low
        keep = _next(low, high, failed, estimate(probes) if slow < 2 else None) if width > TOLERANCE else least
        probes.append(probe(keep))
        if probes[-1].met:
            high = keep
            if keep == least:
                break
        else:
            low, failed = keep, True
        slow = slow + 1 if slow < 2 and high - low > width / 2 else 0
    return probes


def _next(low: float, high: float, failed: bool, estimate: float | None) -> float:
    """Return the share to probe next: beside the estimate on the side that is not close yet, or in the middle."""
    if estimate is None:
        return round((low + high) / 2, 4)
    if estimate <= low and not failed:
        return low
    beside = estimate + ASIDE if high - estimate > TOLERANCE / 2 else estimate - ASIDE
    inside = low + TOLERANCE / 5 < beside < high - TOLERANCE / 5
    return round(beside if inside else (low + high) / 2, 4)
