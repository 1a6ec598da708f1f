"""What holds for every kind of weight. A new kind is one more row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.model.kinds import KINDS, Sink, dense_weight, kind_of, watch

Make = Callable[[int, int, bool], nn.Module]  # (n, m, bias)


def conv1d(n: int, m: int, bias: bool) -> nn.Module:
    layer = Conv1D(m, n)
    nn.init.normal_(layer.bias)
    if not bias:
        layer.bias.data.zero_()
    return layer


ROWS: dict[str, tuple[str, Make]] = {
    "nn.Linear": ("linear", lambda n, m, bias: nn.Linear(n, m, bias)),
    "Conv1D": ("linear", conv1d),
}
SIZES = {"n": st.integers(1, 9), "m": st.integers(1, 9), "bias": st.booleans(), "rows": st.integers(1, 5)}


def test_every_kind_has_a_row():
    assert sorted({kind for kind, _ in ROWS.values()}) == KINDS.names()


@pytest.mark.parametrize("row", sorted(ROWS))
@settings(max_examples=25, deadline=None)
@given(by_name=st.booleans(), **SIZES)
def test_a_sink_is_given_what_passes_the_weight(row, n, m, bias, rows, by_name):
    """The inputs, W x without the bias, the gradients at the output and at the input: by position and by keyword."""
    name, make = ROWS[row]
    module = make(n, m, bias).double()
    assert kind_of(module).name == name
    weight = dense_weight(module).detach()
    assert weight.shape == (m, n)
    seen: dict[str, Tensor] = {}

    def called(x, product):
        seen["input"], seen["output"] = x.detach(), product()
        return lambda g: seen.__setitem__("gradient", g)

    module.requires_grad_(False)
    handles = watch(module, Sink(called, lambda g: seen.__setitem__("input_gradient", g), starts=True))
    x, v = torch.randn(2, rows, n, dtype=torch.float64), torch.randn(2, rows, m, dtype=torch.float64)
    keyword = "x" if isinstance(module, Conv1D) else "input"
    y = module(**{keyword: x}) if by_name and keyword == "input" else module(x)
    y.backward(v)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen["input"], x)
    torch.testing.assert_close(seen["output"], x @ weight.T)
    torch.testing.assert_close(seen["gradient"], v)
    torch.testing.assert_close(seen["input_gradient"], v @ weight)
    torch.testing.assert_close(module(x), y.detach())
    assert not module(x).requires_grad  # the handles have ended it


@pytest.mark.parametrize("row", sorted(ROWS))
@pytest.mark.parametrize("form", ["auto", "plain"])
@settings(max_examples=25, deadline=None)
@given(**SIZES)
def test_a_layer_computes_the_same_as_its_factors(row, form, n, m, bias, rows):
    kind, module = KINDS.get(ROWS[row][0]), ROWS[row][1](n, m, bias).double()
    rank = max(1, min(n, m) - 1)
    left, right = torch.randn(m, rank, dtype=torch.float64), torch.randn(rank, n, dtype=torch.float64)
    layer = kind.layer(module, left, right, form, torch.float64)
    x = torch.randn(rows, n, dtype=torch.float64)
    expected = x @ (left @ right).T + (module.bias if module.bias is not None else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-8)
    target = kind.target("layer", module)
    assert (target.out_features, target.in_features, target.transposed) == (m, n, isinstance(module, Conv1D))
    assert type(layer.dense_module()) is type(module)
