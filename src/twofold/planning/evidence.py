"""What an allocation looks at beside the spectra, measured on the model when it asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from twofold.allocate import ALLOCATIONS
from twofold.evidence.base import Measurement
from twofold.evidence.rounding import Rounding, measure_rounding
from twofold.inference.latency import LayerTimes


@dataclass(frozen=True)
class Evidence:
    """What is known of all weights beside their spectra, by the names of weights."""

    tokens: int = 1  # that were calibrated on
    measured: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)  # what the allocation asks for
    rounding: Mapping[str, Rounding] = field(default_factory=dict)  # what integers lose, if bits are chosen too
    times: Mapping[str, LayerTimes] = field(default_factory=dict)  # where a budget is in time
    times_of: str = ""  # the machine that they were measured on


def gather(work: Measurement, allocate: str) -> Evidence:
    """Measure what an allocation asks for, or what rounding loses where bits are chosen too; nothing for most."""
    if work.settings.bits == "auto":
        return Evidence(rounding=measure_rounding(work))
    means = work.decomposition.objective.loss != "weight"  # those are no means over tokens
    tokens = work.samples.predictions if work.samples is not None and means else 1
    measure = ALLOCATIONS.get(allocate).measure
    return Evidence(tokens) if measure is None else Evidence(tokens, measure(work))
