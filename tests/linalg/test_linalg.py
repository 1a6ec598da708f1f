"""Properties of the weighted low-rank kernel and the gauge form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twofold.linalg.gauge import BOUND, gauge_form, gauge_rank, gauge_storage, plain_storage
from twofold.linalg.metric import damp, roots
from twofold.linalg.spectrum import gram, smaller_side, spectrum_of, truncate, truncation_loss, weighted_low_rank

SIZES = st.integers(2, 24)
KINDS = st.sampled_from(["none", "diagonal", "full"])


def draw_metric(kind: str, size: int, generator: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "diagonal":
        return torch.rand(size, dtype=torch.float64, generator=generator) + 0.1
    root = torch.randn(size, size + 3, dtype=torch.float64, generator=generator)
    return root @ root.T / size


def as_full(metric: Tensor | None, size: int) -> Tensor:
    if metric is None:
        return torch.eye(size, dtype=torch.float64)
    return torch.diag(metric) if metric.dim() == 1 else metric


def loss(weight: Tensor, other: Tensor, left: Tensor | None, right: Tensor | None) -> float:
    """‖left^½ (W − W′) right^½‖² from its definition."""
    difference = weight - other
    m, n = weight.shape
    return float(torch.trace(as_full(left, m) @ difference @ as_full(right, n) @ difference.T))


@settings(max_examples=60, deadline=None)
@given(m=SIZES, n=SIZES, left_kind=KINDS, right_kind=KINDS, seed=st.integers(0, 10**6), data=st.data())
def test_error_is_the_tail_and_no_other_matrix_does_better(m, n, left_kind, right_kind, seed, data):
    generator = torch.Generator().manual_seed(seed)
    rank = data.draw(st.integers(1, min(m, n)))
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    left, right = draw_metric(left_kind, m, generator), draw_metric(right_kind, n, generator)
    side = smaller_side(m, n)
    near, far = (left, right) if side == "rows" else (right, left)
    matrix = gram(weight, far)
    spectrum = spectrum_of(near, matrix, side)
    a, b = truncate(weight, spectrum, near, rank)
    assert a.shape == (m, rank) and b.shape == (rank, n)
    tail = float(spectrum.tails[rank])
    whole = float(spectrum.tails[0])
    found = loss(weight, a @ b, left, right)
    assert found == pytest.approx(tail, rel=1e-6, abs=1e-9 * whole)
    assert whole == pytest.approx(loss(weight, torch.zeros_like(weight), left, right), rel=1e-9)
    assert truncation_loss(weight, a @ b, near, matrix) == pytest.approx(tail, rel=1e-6, abs=1e-9 * whole)
    # Eckart–Young: perturbed factors of the same rank lose no less.
    for _ in range(5):
        step = 10 ** float(torch.rand(1, generator=generator) * 3 - 3)
        other = (a + step * torch.randn(a.shape, dtype=a.dtype, generator=generator)) @ (
            b + step * torch.randn(b.shape, dtype=b.dtype, generator=generator)
        )
        assert loss(weight, other, left, right) >= tail * (1 - 1e-6) - 1e-9 * whole


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
def test_full_rank_reproduces_the_weight(shape):
    weight = torch.randn(*shape, dtype=torch.float64)
    left, right = draw_metric("full", shape[0], torch.Generator()), draw_metric("full", shape[1], torch.Generator())
    a, b = weighted_low_rank(weight, min(shape), left, right)
    torch.testing.assert_close(a @ b, weight, rtol=1e-8, atol=1e-8)


def test_matches_the_plain_decomposition():
    weight = torch.randn(10, 15, dtype=torch.float64)
    singular = torch.linalg.svdvals(weight)
    spectrum = spectrum_of(None, gram(weight, None), "rows")
    torch.testing.assert_close(spectrum.values, singular**2, rtol=1e-9, atol=1e-9)


def test_a_rank_deficient_metric_does_no_harm():
    weight = torch.randn(8, 20, dtype=torch.float64)
    seen = torch.randn(20, 3, dtype=torch.float64)  # inputs lie in three directions only
    a, b = weighted_low_rank(weight, 3, None, seen @ seen.T)
    torch.testing.assert_close(a @ (b @ seen), weight @ seen, rtol=1e-6, atol=1e-6)
    left = torch.zeros(8, 8, dtype=torch.float64)
    left[0, 0] = 1.0
    a, b = weighted_low_rank(weight, 2, left, None)
    torch.testing.assert_close((a @ b)[0], weight[0], rtol=1e-6, atol=1e-6)


def test_batched_as_one_by_one():
    weights = torch.randn(3, 6, 9, dtype=torch.float64)
    metrics = torch.stack([draw_metric("full", 6, torch.Generator().manual_seed(i)) for i in range(3)])
    together = spectrum_of(metrics, gram(weights, None), "rows")
    for i in range(3):
        alone = spectrum_of(metrics[i], gram(weights[i], None), "rows")
        torch.testing.assert_close(together[i].values, alone.values)
        for one, other in zip(
            truncate(weights[i], together[i], metrics[i], 2), truncate(weights[i], alone, metrics[i], 2), strict=True
        ):
            torch.testing.assert_close(one.abs(), other.abs())


def test_equal_metrics_of_a_batch_are_decomposed_once(monkeypatch):
    metric = draw_metric("full", 6, torch.Generator())
    weights = torch.randn(3, 9, 6, dtype=torch.float64)
    grams = gram(weights, None)
    calls = []
    monkeypatch.setattr("twofold.linalg.spectrum.roots", lambda m, eps: calls.append(len(m)) or roots(m))
    together = spectrum_of(torch.stack([metric, metric, metric + torch.eye(6)]), grams, "columns")
    assert calls == [2]
    alone = spectrum_of(metric, grams[1], "columns")
    torch.testing.assert_close(together[1].values, alone.values)


def test_roots_cut_off_what_is_null():
    metric = torch.diag(torch.tensor([4.0, 1.0, 1e-20], dtype=torch.float64))
    root, inverse = roots(metric)
    torch.testing.assert_close(root, torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)))
    torch.testing.assert_close(inverse, torch.diag(torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64)))


def test_damping_is_relative_and_zeros_become_the_identity():
    moment = torch.diag(torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(damp(moment, 0.5), torch.diag(torch.tensor([4.0, 2.0])))
    torch.testing.assert_close(damp(torch.zeros(2, 2), 0.5), torch.eye(2))
    torch.testing.assert_close(damp(torch.tensor([3.0, 1.0]), 0.5, full=False), torch.tensor([4.0, 2.0]))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        spectrum_of(None, torch.full((3, 3), float("nan")), "rows")


@settings(max_examples=80, deadline=None)
@given(m=st.integers(2, 40), n=st.integers(2, 40), seed=st.integers(0, 10**6), data=st.data())
def test_gauge_form_equals_the_product(m, n, seed, data):
    generator = torch.Generator().manual_seed(seed)
    rank = data.draw(st.integers(1, min(m, n) - (m == n)))
    a = torch.randn(m, rank, dtype=torch.float64, generator=generator)
    b = torch.randn(rank, n, dtype=torch.float64, generator=generator)
    form = gauge_form(a, b)
    assert form is not None
    assert form.reduce.numel() + form.expand.numel() == gauge_storage(m, n, rank)
    assert form.largest <= BOUND
    order = form.order.long()
    assert sorted(order.tolist()) == list(range(m if form.form == "rows" else n))
    if form.form == "rows":
        product = torch.cat([form.reduce, form.expand @ form.reduce])[order]
        assert form.expand.abs().max() <= BOUND
    else:
        product = torch.empty(m, n, dtype=torch.float64)
        product[:, order] = torch.cat([form.expand, form.expand @ form.reduce], 1)
        assert form.reduce.abs().max() <= BOUND
    torch.testing.assert_close(product, a @ b, rtol=1e-8, atol=1e-8 * float((a @ b).abs().max()))


def test_coefficients_stay_bounded_where_partial_pivoting_alone_does_not():
    # Wilkinson's matrix: partial pivoting grows as 2^r.
    r = 30
    wilkinson = torch.eye(r, dtype=torch.float64) - torch.ones(r, r, dtype=torch.float64).tril(-1)
    a = torch.cat([wilkinson, -torch.ones(1, r, dtype=torch.float64)])
    form = gauge_form(a, torch.randn(r, 60, dtype=torch.float64), "rows")
    assert form is not None and form.largest <= BOUND


def test_no_gauge_form_without_full_rank():
    a = torch.zeros(6, 2, dtype=torch.float64)
    assert gauge_form(a, torch.zeros(2, 5, dtype=torch.float64)) is None


@pytest.mark.parametrize(("m", "n"), [(576, 576), (1536, 576), (192, 576)])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_gauge_rank_is_the_largest_that_fits(m, n, keep):
    rank = gauge_rank(m, n, keep * m * n)
    assert gauge_storage(m, n, rank) <= keep * m * n < gauge_storage(m, n, rank + 1)
    assert gauge_rank(m, n, m * n) == min(m, n)
    assert gauge_storage(m, n, min(m, n)) == m * n
    assert plain_storage(m, n, rank) == rank * (m + n)
