"""Layers on a basis that others use too: the suite of every storage layer, and what several of them have in common."""

from __future__ import annotations

import copy

import pytest
import torch
from conformance import CompactSuite, Drawn, Made
from torch import nn

from twofold.linalg.gauge import gauge_storage, plain_storage
from twofold.nn.layers._basis import SharedBasis
from twofold.nn.layers.shared import SharedLinear
from twofold.nn.places import BASES, hold_bases, put_back


class TestShared(CompactSuite):
    kind, forms = SharedLinear, SharedLinear.FORMS
    trained = ("layer.expand.weight", f"{BASES}.b.reduce.weight")

    def make(self, form: str, draw: Drawn) -> Made:
        m, n, plain = draw.m, draw.n, form == "shared-plain"
        rank = draw.size(min(m, n if plain else n - 1))
        left, right = draw.matrix(m, rank), draw.matrix(rank, n)
        basis, own = SharedBasis.from_factors("b", left, right, "plain" if plain else "auto")
        layer = SharedLinear.on(basis, own, draw.bias, draw.transposed)
        return Made(layer, left @ right, (plain_storage if plain else gauge_storage)(m, n, rank))


def make(form, m=(7, 5), n=9, rank=4):
    """Return two layers on one basis, and the weight of each as one matrix."""
    left, right = torch.randn(sum(m), rank, dtype=torch.float64), torch.randn(rank, n, dtype=torch.float64)
    basis, own = SharedBasis.from_factors("b", left, right, form)
    biases = [torch.randn(m[0], dtype=torch.float64), None]
    layers = [SharedLinear.on(basis, expand, bias) for expand, bias in zip(own.split(m), biases, strict=True)]
    return basis, layers, (left @ right).split(m), biases


@pytest.mark.parametrize("form", ["plain", "auto"])
def test_two_layers_store_their_basis_once(form):
    torch.manual_seed(0)
    basis, layers, weights, biases = make(form)
    assert basis.form == ("shared-plain" if form == "plain" else "shared-columns")
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias))
        torch.testing.assert_close(layer.expand.weight @ basis.matrix(torch.float64), weight)
        assert set(layer.state_dict()) == {"expand.weight", "weight", *(["bias"] if bias is not None else [])}
        assert layer.settings() == {"kind": "shared", "rank": 4, "form": basis.form, "basis": "b"}
    stored = basis.reduce.weight.numel() + sum(layer.expand.weight.numel() for layer in layers)
    assert (
        stored == basis.numbers + sum(layer.numbers for layer in layers) == 4 * (9 + 12 - (0 if form == "plain" else 4))
    )


def test_what_a_basis_can_not_be():
    with pytest.raises(ValueError, match="between 1 and 8, got 9"):
        SharedBasis("b", 9, 9, "shared-columns")
    assert SharedBasis("b", 9, 9, "shared-plain").numbers == 81
    for rank in (0, 10):
        with pytest.raises(ValueError, match="between 1 and 9"):
            SharedBasis("b", 9, rank)
    with pytest.raises(ValueError, match="the form must be one of shared-plain, shared-columns"):
        SharedBasis("b", 9, 3, "rows")
    basis = SharedBasis("b", 9, 3, "shared-columns")
    assert basis.index_error() is None
    basis.order[0] = 8
    assert basis.index_error() == "order in the checkpoint is no order of its 9 columns"


def test_a_basis_that_is_not_of_full_rank_is_stored_plain():
    torch.manual_seed(0)
    left, right = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    right[2] = 0
    basis, own = SharedBasis.from_factors("b", left, right)
    assert basis.form == "shared-plain" and basis.order is None
    torch.testing.assert_close(own @ basis.matrix(torch.float64), left @ right)


def test_copies_keep_the_link():
    basis, layers, _, _ = make("auto")
    model = nn.ModuleDict({"a": layers[0], "b": layers[1]})
    hold_bases(model)
    assert list(dict(model.named_parameters())) == [
        "a.bias", "a.expand.weight", "b.expand.weight", f"{BASES}.b.reduce.weight",
    ]  # fmt: skip
    whole = copy.deepcopy(model)
    assert whole["a"].basis is whole["b"].basis is getattr(whole, BASES)["b"] is not basis
    together = copy.deepcopy({"a": model["a"], "b": model["b"]})
    assert together["a"].basis is together["b"].basis is not basis
    model["a"] = copy.deepcopy(model["a"])  # alone it has a basis of its own, which no file could hold
    with pytest.raises(ValueError, match="two bases that are called b"):
        hold_bases(model)
    del model["a"], model["b"]
    hold_bases(model)
    assert not hasattr(model, BASES)


def test_dense_layers_that_come_back_take_the_basis_along():
    _, layers, _, _ = make("auto")
    dense = nn.ModuleDict({"a": nn.Linear(9, 7), "b": nn.Linear(9, 5)})
    before = dict(dense.named_modules())
    with put_back(dense, ["a", "b"]):
        dense["a"], dense["b"] = layers
        hold_bases(dense)
        assert hasattr(dense, BASES)
    assert dict(dense.named_modules()) == before
