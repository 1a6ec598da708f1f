"""Integers with a correction of low rank: the suite of every storage layer, and the ranks that a correction may have."""

from __future__ import annotations

import pytest
import torch
from conformance import CompactSuite, Drawn, Made

from twofold.linalg.gauge import plain_storage
from twofold.nn.int_matrix import IntLinear
from twofold.nn.layers.corrected import CorrectedLinear


class TestCorrected(CompactSuite):
    kind, forms = CorrectedLinear, CorrectedLinear.FORMS
    trained = ("layer.reduce.weight", "layer.expand.weight")
    said = ("bits", "rank")

    def make(self, form: str, draw: Drawn) -> Made:
        m, n = draw.m, draw.n
        rank = draw.size(min(m, n))
        inner, rounded = draw.integers(m, n, IntLinear)
        left, right = draw.matrix(m, rank), draw.matrix(rank, n)
        layer = CorrectedLinear.correct(inner, left, right, draw.bias, draw.transposed, torch.float64)
        return Made(layer, rounded + left @ right, m * n + plain_storage(m, n, rank))


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_no_correction_has_is_refused(rank):
    with pytest.raises(ValueError, match="the rank of a correction"):
        CorrectedLinear(8, 6, 4, None, rank=rank)
