"""The factored layer computes its product, stores what it says, and lives as any module does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from twofold.nn.layers.factored import FactoredLinear

FORMS = ["plain", "rows", "columns"]


def make(form, m=10, n=14, rank=4, bias=True, dtype=torch.float64):
    left, right = torch.randn(m, rank, dtype=torch.float64), torch.randn(rank, n, dtype=torch.float64)
    vector = torch.randn(m, dtype=dtype) if bias else None
    return FactoredLinear.from_factors(left, right, vector, form, dtype=dtype), left @ right, vector


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_computes_the_product(form, bias):
    layer, product, vector = make(form, bias=bias)
    assert layer.form == form
    x = torch.randn(2, 3, 14, dtype=torch.float64)
    expected = nn.functional.linear(x, product, vector)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.to_dense(), product)


@pytest.mark.parametrize("form", FORMS)
def test_storage_is_what_it_says(form):
    layer, _, _ = make(form)
    stored = layer.reduce.weight.numel() + layer.expand.weight.numel()
    assert stored == layer.numbers == (4 * 24 if form == "plain" else 4 * (24 - 4))
    assert layer.keep == stored / 140
    order = {"plain": None, "rows": 10, "columns": 14}[form]
    assert (
        (layer.order is None) if order is None else (layer.order.shape == (order,) and layer.order.dtype == torch.int32)
    )
    assert isinstance(layer.reduce, nn.Linear) and isinstance(layer.expand, nn.Linear)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype(form, dtype):
    layer, product, _ = make(form, bias=False)
    layer = layer.to(dtype)
    assert layer.weight.dtype == dtype
    y = layer(torch.ones(14, dtype=dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(y.double(), product.sum(1), rtol=tolerance, atol=tolerance * 10)


def test_meta_and_round_trip():
    layer, _, _ = make("rows")
    empty = FactoredLinear(14, 10, 4, "rows", device="meta", dtype=torch.float64)
    assert all(t.is_meta for t in empty.state_dict().values())
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(5, 14, dtype=torch.float64)
    assert torch.equal(empty(x), layer(x))


def test_gradients_reach_both_factors():
    layer, _, _ = make("columns")
    layer(torch.randn(3, 14, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_repr_says_shape_rank_and_keep():
    layer, _, _ = make("rows")
    for part in ("in_features=14", "out_features=10", "rank=4", "form=rows", "keep=0.571"):
        assert part in repr(layer)


@pytest.mark.parametrize(("form", "rank"), [("rows", 10), ("columns", 15), ("plain", 0), ("plain", 11)])
def test_impossible_ranks_are_refused(form, rank):
    with pytest.raises(ValueError, match="must be between 1 and"):
        FactoredLinear(14, 10, rank, form)
    with pytest.raises(ValueError, match="form must be one of"):
        FactoredLinear(14, 10, 2, "diagonal")


def test_full_rank_of_a_rectangle():
    weight = torch.randn(10, 14, dtype=torch.float64)
    layer = FactoredLinear.from_factors(torch.eye(10, dtype=torch.float64), weight)
    assert layer.form == "columns" and layer.numbers == 140
    torch.testing.assert_close(layer.to_dense(), weight)


def test_falls_back_to_plain_without_bounded_coefficients():
    layer = FactoredLinear.from_factors(torch.zeros(6, 2), torch.zeros(2, 5))
    assert layer.form == "plain" and torch.equal(layer.to_dense(), torch.zeros(6, 5))


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_gradients_through_the_order(form):
    """The layer reorders by a function of its own where gradients are asked for."""
    layer, _, _ = make(form)
    x = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))
    batched = torch.func.vmap(torch.func.grad(lambda one: layer(one).square().sum()))(x)
    torch.testing.assert_close(batched, torch.autograd.grad(layer(x).square().sum(), x)[0])
    with torch.no_grad():
        plain = layer(x)
    torch.testing.assert_close(layer(x).detach(), plain, rtol=0, atol=0)
