"""What a structure is: weights whose sizes are chosen together, since one makes what the other reads, or they share a part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from twofold.model.structure import Structure
from twofold.nn.compact import CompactLinear

if TYPE_CHECKING:
    from twofold.calibrate.moments import Moments


class Cut(Protocol):
    """A structure that is ready to be cut to any size."""

    losses: Tensor  # (units + 1,), of keeping 0, 1, … units; or longer

    def layers(self, units: int, stored: torch.dtype) -> tuple[Mapping[str, CompactLinear], float]:
        """The layers of one size by the names of the members, and the loss that was measured from what they store."""
        ...


Prepare = Callable[[Structure, nn.Module, "Moments", float], Cut]
