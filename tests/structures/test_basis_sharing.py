"""Bases that several blocks share: the closed form against the published one, and what a plan counts for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bases import target
from twofold.calibrate.moments import Moments
from twofold.decompose.decompose import Decomposition
from twofold.decompose.spectra import Spectra
from twofold.factor.apply import apply_plan
from twofold.model.settings import Override
from twofold.model.target import Targets
from twofold.objectives import OBJECTIVES
from twofold.planning.make import make_plan
from twofold.planning.menu import PlanRequest
from twofold.planning.structures import structure_candidate
from twofold.recipe import make_recipe
from twofold.structures.shared_basis import CutShared
from twofold.structures.sharing import sharing

DAMPING = 1e-2
UNIFORM = make_recipe({"model": "m", "keep": 0.95, "objective": "basis-sharing", "allocate": "uniform"})


def blocks_of(*shapes):
    torch.manual_seed(0)
    return nn.ModuleDict({str(i): nn.Linear(n, m, bias=False, dtype=torch.float64) for i, (m, n) in enumerate(shapes)})


def moments_of(inputs):
    """The moments of layers whose inputs (T, n) are given, each of its own."""
    sums = {}
    for name, x in inputs.items():
        sums |= {f"input/{name}": x.T @ x, f"rows/{name}": torch.tensor(float(len(x)))}
    return Moments(sums, max(map(len, inputs.values())), {}, "")


def published(weights, inputs, rank):
    """The method as the paper writes it, step by step: y = x W, weights side by side, S from Cholesky, W ≈ (S⁻¹ U Σ)(Vᵀ)."""
    n = inputs[0].shape[1]
    total = sum(x.T @ x for x in inputs)
    total = total + DAMPING * total.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    s = torch.linalg.cholesky(total)  # S Sᵀ = Σ XᵀX
    beside = torch.cat([weight.T for weight in weights], 1)  # (n, Σm)
    u, sigma, vh = torch.linalg.svd(s.T @ beside, full_matrices=False)
    basis = torch.linalg.solve(s.T, u[:, :rank] * sigma[:rank])  # (n, r)
    coefficients = vh[:rank].split([len(weight) for weight in weights], 1)
    return [(basis @ own).T for own in coefficients], float(sigma[rank:].square().sum())


@pytest.mark.parametrize("form", ["gauge", "plain"])
@pytest.mark.parametrize("tokens", [(50, 50), (60, 20)])
@pytest.mark.parametrize("shape", [(4, 13), (10, 13), (16, 11)])  # stacked: wide, tall, tall by themselves
def test_the_loss_and_the_weights_are_the_published_ones(shape, tokens, form):
    m, n = shape
    block = blocks_of(shape, shape)
    inputs = {
        str(i): torch.randn(t, n, dtype=torch.float64) * torch.linspace(0.2, 2 + i, n) for i, t in enumerate(tokens)
    }
    structure = sharing([target("0", m, n), target("1", m, n)], form)
    cut = CutShared(structure, block, moments_of(inputs), DAMPING)
    weights = [block[name].weight.detach() for name in ("0", "1")]
    largest = structure.units - 1
    assert largest == (min(2 * m, n) - 1 if form == "gauge" else (2 * m * n - 1) // (2 * m + n))
    for rank in (1, largest // 2, largest):
        made, measured = cut.layers(rank, torch.float64)
        wanted, loss = published(weights, list(inputs.values()), rank)
        for name, weight in zip(("0", "1"), wanted, strict=True):
            torch.testing.assert_close(made[name].to_dense(), weight, rtol=1e-7, atol=1e-9)
        loss /= sum(tokens)  # the paper sums over tokens
        assert measured == pytest.approx(loss, rel=1e-6, abs=1e-12)
        assert float(cut.losses[rank]) == pytest.approx(loss, rel=1e-6, abs=1e-12)
        basis = made["0"].basis
        assert basis is made["1"].basis and basis.form == ("shared-columns" if form == "gauge" else "shared-plain")
        stored = basis.numbers + made["0"].numbers + made["1"].numbers
        assert stored == rank * (n + 2 * m - (rank if form == "gauge" else 0)) < 2 * m * n


def stacked(*weights):
    """Two layers of these weights, as targets on one basis, with the moments of some inputs."""
    block = blocks_of(*(weight.shape for weight in weights))
    with torch.no_grad():
        for layer, weight in zip(block.values(), weights, strict=True):
            layer.weight.copy_(weight)
    found = [target(name, *weight.shape) for name, weight in zip(block, weights, strict=True)]
    x = torch.randn(40, weights[0].shape[1], dtype=torch.float64)
    return block, Targets(found, [], structures=(sharing(found, "gauge"),)), moments_of(dict.fromkeys(block, x))


def test_without_a_bounded_form_plain_factors_take_no_more_storage():
    block, targets, moments = stacked(torch.zeros(6, 12), torch.zeros(6, 12))
    plan = make_plan("m", targets, None, UNIFORM, 8)
    assert {(entry.rank, entry.form) for entry in plan.entries} == {(9, "shared-columns")}
    done, replaced = apply_plan(
        block, plan, Decomposition(moments, OBJECTIVES.get("basis-sharing"), DAMPING, Spectra()), torch.float64,
        structures=targets.structures, quiet=True,
    )  # fmt: skip
    assert {(e.rank, e.form) for e in done.entries} == {(5, "shared-plain")} and len(
        replaced
    ) == 2  # 9 · (24 − 9) // 24
    assert done.target_after == 5 * 24 == sum(p.numel() for p in block.parameters()) <= plan.target_after
    assert done.order_numbers == 0 and sum("no bounded gauge form" in note for note in done.notes) == 2
    assert torch.equal(block["0"](torch.ones(3, 12, dtype=torch.float64)), torch.zeros(3, 6, dtype=torch.float64))


def test_no_rank_is_chosen_that_the_weights_have_not():
    weight = torch.randn(6, 12, dtype=torch.float64)
    block, targets, moments = stacked(weight, weight)  # of rank 6 together
    losses = CutShared(targets.structures[0], block, moments, DAMPING).losses
    plan = make_plan("m", targets, {"1": (losses[:-1] - losses[1:]).numpy()}, UNIFORM, 8)
    assert {entry.rank for entry in plan.entries} == {6}


@pytest.mark.parametrize(("shape", "full"), [((4, 13), 8), ((16, 11), 11)])
def test_at_full_rank_nothing_is_lost(shape, full):
    weights = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    block, _, moments = stacked(*weights)
    plain = sharing([target("0", *shape), target("1", *shape)], "plain")
    made, lost = CutShared(plain, block, moments, DAMPING).layers(full, torch.float64)
    assert lost < 1e-12
    for name, weight in zip(("0", "1"), weights, strict=True):
        torch.testing.assert_close(made[name].to_dense(), weight)


@pytest.mark.parametrize("form", ["gauge", "plain"])
def test_what_a_rank_costs_in_bytes(form):
    targets = [target(str(i), 20, 30) for i in range(3)]
    structure, rank = sharing(targets, form), 7
    recipe = make_recipe({"model": "m", "budget": "9KB", "objective": "basis-sharing", "form": form})
    found = Targets(targets, [], structures=(structure,))
    request = PlanRequest(found, {structure.name: np.zeros(structure.units)}, recipe, 4)
    candidate = structure_candidate(request, structure, request.tails(structure.name, structure.units))
    (cost,) = candidate.costs[candidate.ranks == rank]
    recipe = recipe.model_copy(update={"overrides": {"*": Override(rank=rank)}})
    plan = make_plan("m", found, {structure.name: np.zeros(structure.units)}, recipe, 4)
    numbers, order = (7 * (30 + 60 - 7), 30) if form == "gauge" else (7 * 90, 0)
    assert cost == plan.bytes_after == 4 * (numbers + order + 3)  # and a guard in each layer
    once = 7 * (30 + 20 - 7) if form == "gauge" else 7 * 50
    assert [e.multiplications for e in plan.entries] == [once] * 3 and plan.multiplications_after == 3 * once


def test_a_basis_counts_as_many_layers_as_it_serves():
    pair, one = [target(f"{i}.a", 32, 32) for i in range(2)], target("b", 64, 32)
    targets = Targets([*pair, one], [], structures=(sharing(pair, "gauge"), sharing([one], "gauge", "alone")))
    values = np.linspace(1, 0.01, 32)  # the same of both, which cost the same too
    recipe = make_recipe({"model": "m", "keep": 0.6, "objective": "basis-sharing"})
    ranks = [e.rank for e in make_plan("m", targets, {"1.a": values, "b": values}, recipe, 4).entries]
    assert ranks[0] == ranks[1] > ranks[2]
