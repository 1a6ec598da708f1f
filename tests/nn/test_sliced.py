"""Sliced layers: the suite of every storage layer, and what is special to rows or columns that are kept."""

from __future__ import annotations

import pytest
import torch
from conformance import CompactSuite, Drawn, Made
from torch import nn

from twofold.nn.layers.sliced import SlicedLinear

INDEX = torch.tensor([1, 4, 5, 9])


class TestSliced(CompactSuite):
    kind, forms, integers = SlicedLinear, SlicedLinear.FORMS, True
    trained, said = ("layer.inner.weight",), ("kept",)

    def make(self, form: str, draw: Drawn) -> Made:
        size, other = (draw.m, draw.n) if form == "kept-rows" else (draw.n, draw.m)
        index = draw.order(size)[: draw.size(size)].sort().values
        kept = torch.zeros(size, other, dtype=torch.float64)
        kept[index] = draw.matrix(len(index), other)
        weight = kept if form == "kept-rows" else kept.T
        part = weight[index] if form == "kept-rows" else weight[:, index]
        layer = SlicedLinear.from_part(part, index, size, form, draw.bias, draw.transposed)
        return Made(layer, weight, len(index) * other)


def make(form: str) -> SlicedLinear:
    """Return a layer (10, 14) of four rows or columns."""
    part = torch.randn((4, 14) if form == "kept-rows" else (10, 4))
    return SlicedLinear.from_part(part, INDEX, 10 if form == "kept-rows" else 14, form)


@pytest.mark.parametrize("form", SlicedLinear.FORMS)
def test_the_index_is_what_was_kept_and_its_repr_says_what_it_is(form):
    layer = make(form)
    assert layer.index.dtype == torch.int32 and layer.index.tolist() == INDEX.tolist()
    assert type(layer.inner) is nn.Linear
    for part in ("in_features=14", "out_features=10", "kept=4", f"form={form}"):
        assert part in repr(layer)


@pytest.mark.parametrize(("form", "kept"), [("kept-rows", 11), ("kept-columns", 15), ("kept-rows", 0)])
def test_impossible_sizes_are_refused(form, kept):
    with pytest.raises(ValueError, match="keeps between 1 and"):
        SlicedLinear(14, 10, kept, form)
    with pytest.raises(ValueError, match="form must be one of"):
        SlicedLinear(14, 10, 2, "rows")


@pytest.mark.parametrize("wrong", [[1, 4, 5, 10], [4, 1, 5, 9], [1, 4, 4, 9], [-1, 4, 5, 9]])
def test_an_index_that_does_not_ascend_is_named(wrong):
    layer = make("kept-rows")
    layer.index = torch.tensor(wrong, dtype=torch.int32)
    assert layer.index_error() == "index in the checkpoint does not name 4 of its 10 rows"
