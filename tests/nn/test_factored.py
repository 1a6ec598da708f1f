"""Factored layers: the suite of every storage layer, and what is special to two factors in three forms."""

from __future__ import annotations

import pytest
import torch
from conformance import CompactSuite, Drawn, Made
from torch import nn

from twofold.linalg.gauge import gauge_storage, plain_storage
from twofold.nn.int_matrix import IntLinear
from twofold.nn.layers.factored import FactoredLinear


class TestFactored(CompactSuite):
    kind, forms, integers = FactoredLinear, FactoredLinear.FORMS, True
    trained = ("layer.reduce.weight", "layer.expand.weight")

    def make(self, form: str, draw: Drawn) -> Made:
        m, n = draw.m, draw.n
        rank = draw.size({"plain": min(m, n), "rows": min(m - 1, n), "columns": min(m, n - 1)}[form])
        left, right = draw.matrix(m, rank), draw.matrix(rank, n)
        layer = FactoredLinear.from_factors(left, right, draw.bias, form, draw.transposed)
        return Made(layer, left @ right, (plain_storage if form == "plain" else gauge_storage)(m, n, rank))


def make(form: str, m: int = 10, n: int = 14, rank: int = 4) -> FactoredLinear:
    left, right = torch.randn(m, rank, dtype=torch.float64), torch.randn(rank, n, dtype=torch.float64)
    return FactoredLinear.from_factors(left, right, torch.randn(m, dtype=torch.float64), form)


@pytest.mark.parametrize(("form", "length"), [("plain", None), ("rows", 10), ("columns", 14)])
def test_an_order_is_of_the_side_that_the_form_names(form, length):
    order = make(form).order
    assert order is None if length is None else (order.shape, order.dtype) == ((length,), torch.int32)


def test_its_children_are_ordinary_layers_and_its_repr_says_what_it_is():
    layer = make("rows")
    assert type(layer.reduce) is type(layer.expand) is nn.Linear
    for part in ("in_features=14", "out_features=10", "rank=4", "form=rows", "keep=0.571"):
        assert part in repr(layer)


@pytest.mark.parametrize(("form", "rank"), [("rows", 10), ("columns", 15), ("plain", 0), ("plain", 11)])
def test_impossible_ranks_are_refused(form, rank):
    with pytest.raises(ValueError, match="must be between 1 and"):
        FactoredLinear(14, 10, rank, form)
    with pytest.raises(ValueError, match="form must be one of"):
        FactoredLinear(14, 10, 2, "diagonal")


def test_integers_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"reduce must be \(2, 8\)"):
        FactoredLinear(8, 6, 2).hold_integers(4, None, reduce=IntLinear(3, 8, 4, None))


def test_full_rank_of_a_rectangle():
    weight = torch.randn(10, 14, dtype=torch.float64)
    layer = FactoredLinear.from_factors(torch.eye(10, dtype=torch.float64), weight)
    assert layer.form == "columns" and layer.numbers == 140
    torch.testing.assert_close(layer.to_dense(), weight)


def test_falls_back_to_plain_without_bounded_coefficients():
    layer = FactoredLinear.from_factors(torch.zeros(6, 2), torch.zeros(2, 5))
    assert layer.form == "plain" and torch.equal(layer.to_dense(), torch.zeros(6, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_stored_in_the_dtype_that_is_asked_for(dtype):
    left, right = torch.randn(6, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    layer = FactoredLinear.from_factors(left, right, torch.randn(6, dtype=torch.float64), dtype=dtype)
    assert {t.dtype for t in layer.state_dict().values() if t.is_floating_point()} == {dtype}


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_gradients_through_the_order(form):
    """The layer reorders by a function of its own where gradients are asked for."""
    layer = make(form)
    x = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))
    batched = torch.func.vmap(torch.func.grad(lambda one: layer(one).square().sum()))(x)
    torch.testing.assert_close(batched, torch.autograd.grad(layer(x).square().sum(), x)[0])
    with torch.no_grad():
        plain = layer(x)
    torch.testing.assert_close(layer(x).detach(), plain, rtol=0, atol=0)
