"""Stress: zero, constant, duplicate, hugely scaled and outlier-ridden weights and inputs; results finite, losses as predicted."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twofold
from conftest import TEXT, make_model, make_tokenizer
from twofold.factor.apply import factor_layer
from twofold.linalg.spectrum import spectrum_of, truncate, truncation_loss
from twofold.objectives import OBJECTIVES, LayerMoments
from twofold.planning.plan import PlanEntry

SHAPES = [(12, 20), (20, 12), (16, 16)]
ALONE = [one.name for one in OBJECTIVES.all() if one.build is not None]  # the others: test_structures.py


def outlier(matrix, scale=1e4):
    matrix = matrix.clone()
    matrix[:, 3] *= scale
    return matrix


WEIGHTS = {
    "random": lambda m, n: torch.randn(m, n),
    "zero": lambda m, n: torch.zeros(m, n),
    "constant": lambda m, n: torch.ones(m, n),
    "duplicate rows": lambda m, n: torch.randn(2, n).repeat(m // 2, 1),
    "huge": lambda m, n: torch.randn(m, n) * 1e12,
    "tiny": lambda m, n: torch.randn(m, n) * 1e-12,
    "outlier": lambda m, n: outlier(torch.randn(m, n)),
    "one row": lambda m, n: torch.eye(m, 1) * torch.randn(1, n),
}
INPUTS = {
    "random": lambda t, n: torch.randn(t, n),
    "zero": lambda t, n: torch.zeros(t, n),
    "one token": lambda t, n: torch.randn(1, n),
    "duplicate": lambda t, n: torch.randn(1, n).repeat(t, 1),
    "huge": lambda t, n: torch.randn(t, n) * 1e8,
    "outlier": lambda t, n: outlier(torch.randn(t, n)),
    "rank two": lambda t, n: torch.randn(t, 2) @ torch.randn(2, n),
}


def moments_of(weight, x, g):
    m, n = weight.shape
    c, gg = x.T @ x / len(x), g.T @ g / len(g)
    return LayerMoments(
        input=c,
        gradient=gg if m <= n else None,
        input_gradient=weight.T @ gg @ weight if m > n else None,
        input_trace=float(c.trace()),
        gradient_trace=float(gg.trace()),
        input_abs=x.abs().mean(0),
        fisher_rows=g.square().mean(0) * x.square().sum(1).mean(),
    )


def entry_of(m, n, rank):
    return PlanEntry(
        name="layer", kind="layer", layer=None, out_features=m, in_features=n, group="layer", rank=rank, form="gauge",
        transposed=False, bias=False, numbers_before=m * n, numbers_after=rank * (m + n - rank), predicted_loss=None,
        total_loss=None, reason="",
    )  # fmt: skip


@pytest.mark.parametrize("gradients", ["random", "zero", "one token", "outlier"])
@pytest.mark.parametrize("inputs", sorted(INPUTS))
@pytest.mark.parametrize("kind", sorted(WEIGHTS))
def test_finite_and_as_predicted(kind, inputs, gradients):
    torch.manual_seed(0)
    for (m, n), name in ((s, o) for s in SHAPES for o in ALONE):
        weight = WEIGHTS[kind](m, n).double()
        x, g = INPUTS[inputs](40, n).double(), INPUTS[gradients](40, m).double()
        moments = moments_of(weight, x, g)
        # The moments are summed in float32.
        moments = LayerMoments(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in vars(moments).items()})
        problem = OBJECTIVES.get(name).build(weight, moments, 1e-2)
        spectrum = spectrum_of(problem.metric, problem.gram, problem.side)
        spectrum = replace(spectrum, basis=spectrum.basis.float())  # as it is kept
        module = torch.nn.Linear(n, m, bias=False)
        module.weight.data = weight.float()
        rank = min(5, max(spectrum.numerical_rank, 1))  # as the plan does
        layer, entry, _ = factor_layer(
            module, module.weight.detach(), entry_of(m, n, rank), spectrum, problem, torch.float32
        )
        assert all(torch.isfinite(p).all() for p in layer.parameters()), (kind, inputs, gradients, name, m, n)
        dense = layer.to_dense(torch.float64)
        measured = truncation_loss(weight, dense, problem.metric, problem.gram)
        tails = spectrum.tails
        # Moments summed and factors stored in float32 bound what the loss can be told apart to.
        assert entry.measured_loss == measured and entry.rank == layer.rank
        assert measured == pytest.approx(float(tails[layer.rank]), rel=1e-3, abs=1e-5 * float(tails[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outlier_channels_in_every_dtype(dtype):
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] *= 100
            layer.mlp.up_proj.weight[:, 7] *= 30
    model = model.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = twofold.factorize(model, make_tokenizer(), keep=0.7, texts=[TEXT], tokens=64, window=32, quiet=True)
    assert result.dtype == dtype
    assert all(torch.isfinite(p).all() for p in result.parameters())
    with torch.no_grad():
        assert torch.isfinite(result(input_ids=torch.arange(20)[None]).logits).all()


def test_one_token_and_a_layer_that_is_never_reached():
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    result = twofold.factorize(model, make_tokenizer(), keep=0.5, texts=[TEXT], tokens=2, window=2, quiet=True)
    with torch.no_grad():
        assert torch.isfinite(result(input_ids=torch.arange(20)[None]).logits).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_in_a_deficient_metric_is_not_inverted(shape):
    """Moments of eight tokens, summed in float32 and not damped: the approximation must not blow up in unseen directions."""
    m, n = shape
    for seed in range(10):
        torch.manual_seed(seed)
        weight = torch.randn(m, n).double()
        x, g = torch.randn(8, n), torch.randn(8, m)
        # The products are formed in float32, from float32 moments, as the calibration does.
        c, gg = x.T @ x / 8, g.T @ g / 8
        moments = LayerMoments(input=c, gradient=gg if m <= n else None,
                               input_gradient=(weight.T @ gg.double() @ weight).float() if m > n else None,
                               input_trace=float(c.trace()), gradient_trace=float(gg.trace()))  # fmt: skip
        problem = OBJECTIVES.get("two-sided").build(weight, moments, 0.0)
        spectrum = spectrum_of(problem.metric, problem.gram, problem.side, torch.finfo(torch.float32).eps)
        for rank in range(1, spectrum.numerical_rank + 1):
            left, right = truncate(weight, spectrum, problem.metric, rank)
            assert (left @ right).norm() < 4 * weight.norm()


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(8, 40), n=st.integers(8, 40), seed=st.integers(0, 10**6), bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), name=st.sampled_from(ALONE),
    form=st.sampled_from(["gauge", "plain"]), data=st.data(),
)  # fmt: skip
def test_any_shape_rank_dtype_and_metric(m, n, seed, bias, dtype, name, form, data):
    """The stored layer computes what the truncation says, to the precision of its dtype, and loses what was predicted."""
    rank = data.draw(st.integers(1, min(m, n) - 1))
    torch.manual_seed(seed)
    module = torch.nn.Linear(n, m, bias=bias)
    x, g = torch.randn(60, n).double(), torch.randn(60, m).double()
    weight = module.weight.detach().to(dtype).float()
    module.weight.data = weight
    problem = OBJECTIVES.get(name).build(weight.double(), moments_of(weight.double(), x, g), 1e-2)
    spectrum = spectrum_of(problem.metric, problem.gram, problem.side)
    spectrum = replace(spectrum, basis=spectrum.basis.float())
    entry = entry_of(m, n, rank).model_copy(update={"form": form, "bias": bias})
    layer, done, _ = factor_layer(module, module.weight.detach(), entry, spectrum, problem, dtype)
    assert done.rank is not None and layer.rank == done.rank and (form == "plain") == (layer.form == "plain")
    assert all(torch.equal(p, p.to(dtype).float()) for p in (layer.reduce.weight, layer.expand.weight))
    left, right = truncate(weight, spectrum, problem.metric, done.rank)
    eps = torch.finfo(dtype).eps
    scale = float(layer.reduce.weight.detach().norm() * layer.expand.weight.detach().norm())
    torch.testing.assert_close(layer.to_dense(torch.float64), left @ right, rtol=0, atol=4 * eps * scale + 1e-5)
    expected = layer.to_dense() @ x.float().T
    expected = expected.T if module.bias is None else expected.T + module.bias
    torch.testing.assert_close(layer(x.float()), expected.to(x.float().dtype), rtol=1e-4, atol=1e-3)
    tails = spectrum.tails
    assert done.measured_loss >= float(tails[done.rank]) * (1 - 1e-3) - 1e-4 * float(tails[0])
