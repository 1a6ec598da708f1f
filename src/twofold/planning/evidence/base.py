"""What is known of all weights beside their spectra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from twofold.inference.latency import LayerTimes
from twofold.planning.bits import Rounding


@dataclass(frozen=True)
class Evidence:
    """What is known of all weights beside their spectra, by the names of weights."""

    tokens: int = 1  # that were calibrated on
    perplexities: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    scores: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    curves: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    rounding: Mapping[str, Rounding] = field(default_factory=dict)  # what integers lose, if bits are chosen too
    times: Mapping[str, LayerTimes] = field(default_factory=dict)  # where a budget is in time
    times_of: str = ""  # the machine that they were measured on
