"""Centred inputs: what is lost is never more, the mean output is kept, full rank is exact, and LiteASR is its published code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from twofold.calibrate.moments import Moments
from twofold.calibrate.request import request_statistics
from twofold.calibrate.statistics import STATISTICS, size_of
from twofold.decompose.decompose import Decomposition
from twofold.decompose.spectra import Spectra
from twofold.factor.apply import factor_layer
from twofold.linalg.spectrum import spectrum_of, truncate
from twofold.model.target import Target
from twofold.objectives import OBJECTIVES
from twofold.planning.plan import PlanEntry

DAMPING = 1e-2
CENTRED = ["two-sided", "svd-llm", "lite-asr", "diagonal+plain", "diagonal+whitened", "whitened+diagonal"]


def drawn(m, n, seed, size, tokens=40):
    """A layer with a bias, inputs whose mean is so many times their spread, and gradients."""
    generator = torch.Generator().manual_seed(seed)
    normal = {"generator": generator, "dtype": torch.float64}
    dense = nn.Linear(n, m).double()
    with torch.no_grad():
        dense.weight.copy_(torch.randn(m, n, **normal))
        dense.bias.copy_(torch.randn(m, **normal))
    x = torch.randn(tokens, n, **normal) @ torch.randn(n, n, **normal) + size * torch.randn(n, **normal)
    return dense, x, torch.randn(tokens, m, **normal)


def moments_of(objective, target, dense, x, g, both=False):
    """The sums that a calibration makes of inputs and gradients."""
    y, z = x @ dense.weight.detach().T, g @ dense.weight.detach()
    fed = {"inputs": x, "outputs": y, "gradients": g, "input_gradients": z, "pairs": x.square().sum(1) @ g.square()}
    request = request_statistics([target], {}, objective.needs, both_sides=both)
    sums = {}
    for kind, owners in request.sizes.items():
        sums[f"{kind}/layer"] = torch.zeros(size_of(kind, owners["layer"]), dtype=torch.float64)
        STATISTICS[kind].add(sums[f"{kind}/layer"], fed[STATISTICS[kind].feed])
    return Moments(sums, len(x), {}, "mark")


def decomposed(name, dense, x, g, *, centred=True, both=False, damping=DAMPING):
    """The decomposition of one layer under an objective, its target, problem and spectrum."""
    model = nn.ModuleDict({"layer": dense})
    target = Target("layer", *dense.weight.shape, True, False, centred=centred)
    objective = OBJECTIVES.get(name)
    decomposition = Decomposition(moments_of(objective, target, dense, x, g, both), objective, damping, Spectra())
    problem = decomposition.problem(model, target)
    return target, problem, spectrum_of(problem.metric, problem.gram, problem.side)


def factored(dense, target, problem, spectrum, rank):
    numbers = rank * (target.out_features + target.in_features)
    entry = PlanEntry(
        **vars(target), kind="layer", layer=None, group="layer", rank=rank, form="plain", numbers_before=target.size,
        numbers_after=numbers, predicted_loss=0.0, total_loss=0.0, reason="a test",
    )  # fmt: skip
    with torch.no_grad():
        return factor_layer(dense, dense.weight.detach(), entry, spectrum, problem, torch.float64)


SIZES = {"m": st.integers(2, 9), "n": st.integers(2, 9), "seed": st.integers(0, 10**6), "size": st.floats(0, 10)}


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(CENTRED), **SIZES, both=st.booleans())
def test_no_rank_loses_more_than_with_inputs_as_they_are(name, m, n, seed, size, both):
    dense, x, g = drawn(m, n, seed, size)
    _, problem, spectrum = decomposed(name, dense, x, g, both=both)
    _, _, whole = decomposed(name, dense, x, g, centred=False, both=both)
    assert (spectrum.tails <= whole.tails * (1 + 1e-9) + 1e-9).all()
    # They are the moments of what is left of the inputs without their mean.
    _, other, _ = decomposed(name, dense, x - x.mean(0), g, centred=False, both=both)
    torch.testing.assert_close(problem.gram, other.gram)
    torch.testing.assert_close(problem.metric, other.metric)
    torch.testing.assert_close(problem.mean, x.mean(0))
    assert other.mean is None


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(CENTRED), **SIZES, share=st.floats(0.1, 1))
def test_the_mean_output_is_kept_and_full_rank_is_exact(name, m, n, seed, size, share):
    dense, x, g = drawn(m, n, seed, size)
    target, problem, spectrum = decomposed(name, dense, x, g)
    rank = max(1, round(share * min(m, n)))
    layer, entry, _ = factored(dense, target, problem, spectrum, rank)
    scale = float(dense(x).detach().abs().max())
    torch.testing.assert_close(layer(x).mean(0), dense(x).mean(0), atol=1e-9 * scale, rtol=0)
    if rank == min(m, n):
        torch.testing.assert_close(layer(x), dense(x), atol=1e-6 * scale, rtol=0)
        torch.testing.assert_close(layer.bias, dense.bias, atol=1e-6 * scale, rtol=0)
    assert entry.measured_loss == pytest.approx(
        float(spectrum.tails[rank]), abs=1e-8 * float(spectrum.tails[0]) + 1e-12
    )


@settings(max_examples=15, deadline=None)
@given(**SIZES)
def test_the_loss_is_that_of_the_outputs_with_the_best_bias(m, n, seed, size):
    """E‖(W − W′) x + b − b′‖² of svd-llm, undamped: no other bias and no factors of inputs as they are lose less."""
    dense, x, g = drawn(m, n, seed, size)
    target, problem, spectrum = decomposed("svd-llm", dense, x, g, damping=0.0)
    rank = max(1, min(m, n) // 2)
    layer, _, _ = factored(dense, target, problem, spectrum, rank)

    def loss(other):
        return float((other(x) - dense(x)).detach().square().sum(1).mean())

    total = float((dense(x) - dense.bias).detach().square().sum(1).mean())
    assert loss(layer) == pytest.approx(float(spectrum.tails[rank]), abs=1e-7 * total)
    plain, metric, whole = decomposed("svd-llm", dense, x, g, centred=False, damping=0.0)
    before, _, _ = factored(dense, plain, metric, whole, rank)
    assert torch.equal(before.bias, dense.bias)
    assert loss(layer) <= loss(before) * (1 + 1e-7) + 1e-9 * total
    with torch.no_grad():
        layer.bias.add_(0.01)
    assert loss(layer) >= float(spectrum.tails[rank])


def test_a_bias_is_rounded_to_what_is_stored():
    dense, x, g = drawn(6, 8, 0, 5.0)
    target, problem, spectrum = decomposed("two-sided", dense, x, g)
    layer, entry, _ = factored(dense, target, problem, spectrum, 3)
    stored, _, _ = factor_layer(dense, dense.weight.detach(), entry, spectrum, problem, torch.bfloat16)
    assert torch.equal(stored.bias, stored.bias.bfloat16().double()) and not torch.equal(stored.bias, layer.bias)
    # It makes up for the rounding of the factors too.
    error = (stored(x).mean(0) - dense(x).mean(0)).abs()
    assert (error <= stored.bias.abs() * torch.finfo(torch.bfloat16).eps).all()


def test_what_is_no_second_moment_stays_as_it_is():
    centres = {one.name for one in OBJECTIVES.all() if one.centres}
    assert centres == {"two-sided", "svd-llm", "lite-asr"}
    assert OBJECTIVES.get("diagonal+rows").centres and not OBJECTIVES.get("abs+whitened").centres


def test_inputs_that_never_change_lose_nothing():
    dense, x, g = drawn(5, 7, 3, 4.0)
    x = x[:1].expand_as(x)
    target, problem, spectrum = decomposed("two-sided", dense, x, g)
    layer, _, _ = factored(dense, target, problem, spectrum, 1)
    torch.testing.assert_close(layer(x), dense(x))
    assert torch.isfinite(layer.expand.weight).all()


@pytest.mark.parametrize(("m", "n"), [(9, 16), (16, 9), (12, 12)])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_lite_asr_is_its_published_code(m, n, rank):
    """Principal components of the outputs themselves: weight1 = Wᵀ V, weight2 = Vᵀ, bias = Ȳ + (b − Ȳ) V Vᵀ."""
    dense, x, g = drawn(m, n, m * n + rank, 3.0, tokens=80)
    outputs = dense(x).detach()
    mean = outputs.mean(0)
    _, sizes, components = torch.linalg.svd(outputs - mean, full_matrices=False)
    v = components[:rank].T
    target, problem, spectrum = decomposed("lite-asr", dense, x, g, damping=0.3)  # it plays no part
    torch.testing.assert_close(spectrum.values, (sizes.square() / len(x))[: min(m, n)], rtol=1e-7, atol=1e-9)
    left, right = truncate(dense.weight.detach(), spectrum, problem.metric, rank)
    torch.testing.assert_close(left @ right, v @ v.T @ dense.weight.detach(), rtol=1e-6, atol=1e-8)
    layer, _, _ = factored(dense, target, problem, spectrum, rank)
    torch.testing.assert_close(layer.bias, mean + (dense.bias - mean) @ v @ v.T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(layer(x), mean + (outputs - mean) @ v @ v.T, rtol=1e-6, atol=1e-8)


def test_lite_asr_brings_its_ranks_and_its_form():
    from twofold.recipe import make_recipe

    recipe = make_recipe({"model": "m", "objective": "lite-asr", "keep": 0.8})
    assert (recipe.allocate, recipe.form, recipe.rank_multiple) == ("lite-asr", "plain", 16)
    own = make_recipe({"model": "m", "objective": "lite-asr", "keep": 0.8, "form": "gauge", "allocate": "global"})
    assert (own.allocate, own.form, own.rank_multiple) == ("global", "gauge", 16)
    other = make_recipe({"model": "m", "objective": "svd-llm", "keep": 0.8})
    assert (other.allocate, other.form, other.rank_multiple) == ("global", "gauge", None)


def test_means_are_collected_where_a_layer_has_a_bias():
    target = Target("layer", 4, 5, True, False)
    assert not {"input_mean", "output_mean"} & request_statistics([target], {}, {"input", "gradient"}).sizes.keys()
    asked = request_statistics([target], {}, {"input", "bias_mean"}).sizes
    assert asked == request_statistics([replace(target, centred=True)], {}, {"input"}).sizes
    assert asked["input_mean"] == {"layer": 5} and asked["output_mean"] == {"layer": 4} and "input" not in asked
    bare = Target("bare", 4, 5, False, False)
    assert "input_mean" not in request_statistics([bare], {}, {"input", "bias_mean"}).sizes
    both = request_statistics([bare, target], {"layer": "bare"}, {"input", "bias_mean"}).sizes
    assert both["input_mean"] == {"bare": 5}
