"""Embeddings of integers: the suite of every storage layer, for what looks rows up and multiplies nothing."""

from __future__ import annotations

import pytest
import torch
from conformance import CompactSuite, Drawn, Made
from torch import Tensor, nn

from twofold.nn.compact import Compact
from twofold.nn.int_matrix import IntMatrix, int_bytes
from twofold.nn.layers.embedding import QuantizedEmbedding
from twofold.refine.steps.training import trainable


class TestEmbedding(CompactSuite):
    kind, forms, said = QuantizedEmbedding, ("embedding",), ("table.bits",)
    places = {"mistral": "model.embed_tokens"}  # the one whose output layer has a weight of its own

    def make(self, form: str, draw: Drawn) -> Made:
        draw.bias = None
        layer = QuantizedEmbedding(draw.m, draw.n, draw.bits, draw.group, dtype=torch.float64)
        layer.table, weight = draw.integers(draw.m, draw.n, IntMatrix)
        return Made(layer, weight, draw.m * draw.n)

    def matrix(self, layer: Compact) -> Tensor:
        return layer.dense_module(torch.float64).weight

    def dense(self, draw: Drawn) -> nn.Module:
        return nn.Embedding(draw.m, draw.n, dtype=torch.float64)

    def inputs(self, draw: Drawn) -> Tensor:
        return torch.randint(draw.m, (2, 3), generator=draw.generator)

    def expected(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return weight[x]

    def planned(self, layer: QuantizedEmbedding, numbers: int, element: int) -> int:
        """Return what twofold.planning.menu counts for a parameter that is no target: its integers and a guard."""
        return int_bytes(*layer.shape, layer.table.bits, layer.table.group) + element

    def test_gradients_reach_what_is_trained(self) -> None:
        """Ids have no gradient, and there is nothing but integers."""
        assert not trainable(QuantizedEmbedding(11, 20, 8, None))


def test_the_row_of_padding_is_taken_over():
    dense = nn.Embedding(11, 20, padding_idx=3, device="meta")
    layer = QuantizedEmbedding.empty(dense, {"form": "embedding", "bits": 8, "group": None}, nn.Module(), {})
    assert layer.to_empty(device="cpu").dense_module().padding_idx == 3


def test_an_embedding_that_scales_its_rows_is_refused():
    class Scaled(nn.Embedding):
        pass

    with pytest.raises(ValueError, match="it is no embedding but a Scaled"):
        QuantizedEmbedding.empty(Scaled(11, 20), {"form": "embedding", "bits": 8, "group": None}, nn.Module(), {})
