"""A structure made ready to be cut to any size."""

from __future__ import annotations

import torch
from torch import nn

from twofold.calibrate.moments import Moments
from twofold.errors import TwofoldError
from twofold.model.structure import Structure
from twofold.structures.base import Cut, Prepare
from twofold.structures.dense_columns import CutColumns
from twofold.structures.mlp import CutMLP
from twofold.structures.query_key import CutQueries
from twofold.structures.shared_basis import CutShared
from twofold.structures.value_output import CutValues

KINDS: dict[str, Prepare] = {
    "mlp": CutMLP, "value-output": CutValues, "query-key": CutQueries, "dense-columns": CutColumns,
    "shared-basis": CutShared,
}  # fmt: skip


def prepare(structure: Structure, model: nn.Module, moments: Moments, damping: float) -> Cut:
    """A structure that is ready to be cut.

    Raises:
        TwofoldError: naming it, if its weights or moments are not finite.
    """
    cut = KINDS[structure.kind](structure, model, moments, damping)
    if not torch.isfinite(cut.losses).all():
        raise TwofoldError(f"the weights or the moments of {structure.name} hold NaN or infinity")
    return cut
