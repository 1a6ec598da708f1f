"""Output layers on the table of an embedding of integers: the suite of every storage layer, and the link."""

from __future__ import annotations

import pytest
import torch
from conformance import CompactSuite, Drawn, Home, Made
from torch import nn

from twofold.nn.int_matrix import IntMatrix, int_bytes
from twofold.nn.layers.embedding import QuantizedEmbedding
from twofold.nn.layers.tied import TiedLinear


class TestTied(CompactSuite):
    kind, forms = TiedLinear, TiedLinear.FORMS
    said = ()  # the embedding names its bits
    places = {"llama": "lm_head"}

    def make(self, form: str, draw: Drawn) -> Made:
        draw.bias, draw.transposed = None, False  # what has a bias is not tied
        table = QuantizedEmbedding(draw.m, draw.n, draw.bits, draw.group, dtype=torch.float64)
        table.table, weight = draw.integers(draw.m, draw.n, IntMatrix)
        return Made(TiedLinear(table, dtype=torch.float64), weight, draw.m * draw.n)

    def planned(self, layer: TiedLinear, numbers: int, element: int) -> int:
        """Return what twofold.planning.menu counts for an embedding with a tied layer: its integers and two guards."""
        table = layer.embedding.table
        return int_bytes(table.rows, table.columns, table.bits, table.group) + 2 * element


@pytest.mark.parametrize(
    ("table", "bias"), [(nn.Embedding(11, 20), False), (None, False), (QuantizedEmbedding(11, 20, 8, None), True)]
)
def test_without_a_table_of_integers_or_with_a_bias_it_is_refused(table, bias):
    dense = nn.Linear(20, 11, bias)
    with pytest.raises(
        ValueError, match="shares the table of an input embedding that is not of integers, or has a bias"
    ):
        TiedLinear.empty(dense, {"form": "tied"}, Home(dense, table), {})


def test_it_follows_what_is_loaded_into_the_table():
    embedding = QuantizedEmbedding(11, 20, 8, None)
    layer, x = TiedLinear(embedding), torch.randn(2, 20)
    embedding.table.codes.random_()
    embedding.table.scales.fill_(16256)  # one
    assert torch.equal(layer(x), x @ embedding.table.weight.T) and layer(x).any()
