"""The sliced layer computes the part that is kept, stores what it says, and lives as any module does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from twofold.nn.layers.sliced import SlicedLinear

FORMS = ["kept-rows", "kept-columns"]
INDEX = torch.tensor([1, 4, 5, 9])


def make(form, m=10, n=14, bias=True, dtype=torch.float64):
    """The layer, and the dense weight that it stands for."""
    weight = torch.randn(m, n, dtype=torch.float64)
    vector = torch.randn(m, dtype=dtype) if bias else None
    part = weight[INDEX] if form == "kept-rows" else weight[:, INDEX]
    dense = torch.zeros_like(weight)
    if form == "kept-rows":
        dense[INDEX] = weight[INDEX]
    else:
        dense[:, INDEX] = weight[:, INDEX]
    size = m if form == "kept-rows" else n
    return SlicedLinear.from_part(part, INDEX, size, form, vector, dtype=dtype), dense, vector


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_computes_the_part(form, bias):
    layer, dense, vector = make(form, bias=bias)
    x = torch.randn(2, 3, 14, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, vector))
    assert torch.equal(layer.to_dense(), dense)


@pytest.mark.parametrize("form", FORMS)
def test_storage_is_what_it_says(form):
    layer, _, _ = make(form)
    numbers = 4 * 14 if form == "kept-rows" else 10 * 4
    assert layer.inner.weight.numel() == layer.numbers == numbers and layer.keep == numbers / 140
    assert layer.index.dtype == torch.int32 and layer.index.tolist() == INDEX.tolist()
    assert layer.settings() == {"kept": 4, "form": form}
    assert isinstance(layer.inner, nn.Linear) and layer.weight.shape == (1,)
    for part in ("in_features=14", "out_features=10", "kept=4", f"form={form}"):
        assert part in repr(layer)


@pytest.mark.parametrize("form", FORMS)
def test_meta_and_round_trip(form):
    layer, _, _ = make(form)
    empty = SlicedLinear(14, 10, 4, form, device="meta", dtype=torch.float64)
    assert all(t.is_meta for t in empty.state_dict().values()) and empty.index_error() is None
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(5, 14, dtype=torch.float64)
    assert torch.equal(empty(x), layer(x)) and empty.index_error() is None


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_the_part_and_the_input(form):
    layer, dense, vector = make(form)
    x = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    other = x.detach().clone().requires_grad_(True)
    nn.functional.linear(other, dense, vector).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert layer.inner.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("form", "kept"), [("kept-rows", 11), ("kept-columns", 15), ("kept-rows", 0)])
def test_impossible_sizes_are_refused(form, kept):
    with pytest.raises(ValueError, match="keeps between 1 and"):
        SlicedLinear(14, 10, kept, form)
    with pytest.raises(ValueError, match="form must be one of"):
        SlicedLinear(14, 10, 2, "rows")


@pytest.mark.parametrize("wrong", [[1, 4, 5, 10], [4, 1, 5, 9], [1, 4, 4, 9], [-1, 4, 5, 9]])
def test_a_wrong_index_is_named(wrong):
    layer, _, _ = make("kept-rows")
    layer.index = torch.tensor(wrong, dtype=torch.int32)
    assert layer.index_error() == "index in the checkpoint does not name 4 of its 10 rows"
