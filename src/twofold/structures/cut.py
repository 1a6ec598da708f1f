"""A structure that is ready to be cut to any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from twofold.calibrate.moments import Moments
from twofold.errors import TwofoldError
from twofold.model.structure import Structure
from twofold.nn.compact import CompactLinear
from twofold.structures.dense_columns import CutColumns
from twofold.structures.mlp import CutMLP
from twofold.structures.query_key import CutQueries
from twofold.structures.shared_basis import CutShared
from twofold.structures.value_output import CutValues


class Cut(Protocol):
    """A structure that is ready to be cut to any size."""

    losses: Tensor  # (units + 1,), of keeping 0, 1, … units; or longer

    def layers(self, units: int, stored: torch.dtype) -> tuple[Mapping[str, CompactLinear], float]:
        """Return the layers of one size by the names of the members, and the loss measured from what they store."""
        ...


KINDS: dict[str, Callable[[Structure, nn.Module, Moments, float], Cut]] = {
    "mlp": CutMLP, "value-output": CutValues, "query-key": CutQueries, "dense-columns": CutColumns,
    "shared-basis": CutShared,
}  # fmt: skip


def prepare_cut(structure: Structure, model: nn.Module, moments: Moments, damping: float) -> Cut:
    """Make a structure ready to be cut.

    Raises:
        TwofoldError: naming it, if its weights or moments are not finite.
    """
    cut = KINDS[structure.kind](structure, model, moments, damping)
    if not torch.isfinite(cut.losses).all():
        raise TwofoldError(f"the weights or the moments of {structure.name} hold NaN or infinity")
    return cut
