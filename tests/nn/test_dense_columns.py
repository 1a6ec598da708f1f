"""Dense columns beside a low rank: the suite of every storage layer, and what is special to columns that stay dense."""

from __future__ import annotations

import pytest
import torch
from conformance import CompactSuite, Drawn, Made

from twofold.linalg.gauge import gauge_storage, plain_storage
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear


class TestDenseColumns(CompactSuite):
    kind, forms, integers = DenseColumnsLinear, DenseColumnsLinear.FORMS, True
    trained = ("layer.reduce.weight", "layer.expand.weight", "layer.dense.weight")
    said = ("rank", "columns")

    def make(self, form: str, draw: Drawn) -> Made:
        m, columns = draw.m, draw.size(draw.n - 2)
        n = draw.n - columns
        rank = draw.size({"plain": min(m, n), "rows": min(m - 1, n), "columns": min(m, n - 1)}[form])
        left, right, dense, split = (
            draw.matrix(m, rank),
            draw.matrix(rank, n),
            draw.matrix(m, columns),
            draw.order(draw.n),
        )
        rest = FactoredLinear.from_factors(left, right, None, form)
        weight = torch.empty(m, draw.n, dtype=torch.float64)
        weight[:, split] = torch.cat([dense, left @ right], 1)
        layer = DenseColumnsLinear.around(rest, dense, split, draw.bias, draw.transposed)
        factors = (plain_storage if form == "plain" else gauge_storage)(m, n, rank)
        return Made(layer, weight, factors + m * columns)


def test_some_columns_are_dense_and_some_are_not():
    for columns in (0, 14):
        with pytest.raises(ValueError, match=f"between 1 and 13 dense columns, got {columns}"):
            DenseColumnsLinear(14, 10, 2, columns=columns)


def test_a_wrong_split_is_named():
    layer = DenseColumnsLinear(14, 10, 4, columns=3)
    layer.split[0] = layer.split[1]
    assert layer.index_error() == "split in the checkpoint is no order of its 14 columns"
