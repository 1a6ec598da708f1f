"""The natural gradient's step: its parts against direct computation in float64, and the whole on tiny models."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OlmoConfig, OlmoForCausalLM

from conftest import TEXT, make_model, make_tokenizer
from runs import command, kill_program, recipe_of, run_program, same
from twofold import TwofoldError
from twofold.linalg import natural_step as nl
from twofold.model.load import LoadedModel, load_model, load_skeleton
from twofold.model.weights import find_targets
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import replace_module
from twofold.objectives import OBJECTIVES
from twofold.recipe import make_recipe
from twofold.refine.natural_gradient import natural_gradient
from twofold.refine.steps import natural_gradient as ng
from twofold.refine.steps.gradient import sum_half
from twofold.refine.steps.job import Job
from twofold.refine.steps.likeness import Likeness
from twofold.refine.steps.training import training
from twofold.run.compress import compress
from twofold.run.estimate.probe import probe
from twofold.run.factorize import factorize
from twofold.run.plan import plan as plan_of
from twofold.task import TASKS
from twofold.task.text.texts import TokenWindows


def spd(k: int) -> Tensor:
    x = torch.randn(k, 3 * k, dtype=torch.float64)
    return x @ x.T / (3 * k)


def damped(moment: Tensor) -> Tensor:
    return moment + ng.DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def power(moment: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors @ torch.diag(values**exponent) @ vectors.T


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (20, 20)])
def test_a_step_is_that_of_the_formula(shape):
    torch.manual_seed(0)
    (m, n), r = shape, 7
    weight = torch.randn(m, r, dtype=torch.float64) @ torch.randn(r, n, dtype=torch.float64)
    gradient, g, c = torch.randn(m, n, dtype=torch.float64), spd(m), spd(n)
    step = nl.natural_step(
        weight, (gradient, gradient), nl.Basis.of(g, ng.DAMPING), nl.Basis.of(c, ng.DAMPING), r
    )  # halves that agree: the filter takes nothing
    # Directly: roots of the damped moments, the singular vectors of the weight in their coordinates, the projection.
    own = power(damped(g), 0.5) @ weight @ power(damped(c), 0.5)
    plain = power(damped(g), -0.5) @ gradient @ power(damped(c), -0.5)
    u, _, v = torch.linalg.svd(own)
    u, v = u[:, :r], v[:r].T
    tangent = plain - (torch.eye(m).double() - u @ u.T) @ plain @ (torch.eye(n).double() - v @ v.T)
    back = power(damped(g), -0.5) @ tangent @ power(damped(c), -0.5)
    torch.testing.assert_close(step.left @ step.direction @ step.right, back, rtol=1e-8, atol=1e-8)
    assert step.agreed == pytest.approx(float(tangent.square().sum()))
    # What the loss, were it linear, falls by for a small step is the step's inner product with the gradient.
    assert step.agreed == pytest.approx(float((gradient * back).sum()))
    for size in (0.0, 0.05):
        left, right = nl.stepped(step, size, r)
        assert left.shape == (m, r) and right.shape == (r, n)
        u, s, v = torch.linalg.svd(own - size * tangent)
        best = power(damped(g), -0.5) @ (u[:, :r] * s[:r]) @ v[:r] @ power(damped(c), -0.5)
        torch.testing.assert_close(left @ right, best, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(torch.linalg.multi_dot(nl.stepped(step, 0.0, r)), weight, rtol=1e-7, atol=1e-7)


def test_the_filter_takes_the_scatter_out_of_the_direction_and_of_what_is_hoped_for():
    torch.manual_seed(0)
    m, n, r = 24, 32, 6
    weight = torch.randn(m, r, dtype=torch.float64) @ torch.randn(r, n, dtype=torch.float64)
    halves = torch.randn(2, m, n, dtype=torch.float64)
    g, c = nl.Basis.of(spd(m), ng.DAMPING), nl.Basis.of(spd(n), ng.DAMPING)
    step = nl.natural_step(weight, (halves[0], halves[1]), g, c, r)
    first, second = (g.vectors.T @ half @ c.vectors / g.roots[:, None] / c.roots for half in halves)
    own = g.roots[:, None] * (g.vectors.T @ weight @ c.vectors) * c.roots
    u, _, v = torch.linalg.svd(own)
    u, v = u[:, :r], v[:r].T
    share = nl.agreement(first, second)
    assert share.min() == 0 and 0 < share.mean() < 0.5
    mean = nl.on_tangent(share * (first + second) / 2, u, v)
    torch.testing.assert_close(step.direction, mean, rtol=1e-8, atol=1e-8)
    # By a half the direction, by the other the gradient: what is not the same in both cancels.
    falls = [(nl.on_tangent(share * a, u, v) * b).sum() for a, b in ((first, second), (second, first))]
    assert step.agreed == pytest.approx(float(sum(falls) / 2))


def test_the_tangent_space_is_what_keeps_the_rank():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(k, 3, dtype=torch.float64))[0] for k in (9, 12))
    matrix = torch.randn(9, 12, dtype=torch.float64)
    projected = nl.on_tangent(matrix, left, right)
    torch.testing.assert_close(nl.on_tangent(projected, left, right), projected)
    assert torch.linalg.matrix_rank(projected) == 6  # twice the rank: the sum of both spaces
    # The nearest: what is left out stands at right angles to every matrix U A + B V with the two spaces.
    outside = matrix - projected
    assert outside.norm() > 1 and (left.T @ outside).norm() < 1e-10 and (outside @ right).norm() < 1e-10


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (5, 3)])
def test_the_filter_keeps_what_both_halves_say(shape):
    torch.manual_seed(0)
    first, second = torch.randn(2, *shape, dtype=torch.float64)
    share = nl.agreement(first, second)
    rows, columns = ([i * 8 // k for i in range(k)] for k in shape)
    for a in set(rows):
        for b in set(columns):
            at = torch.tensor([[x == a and y == b for y in columns] for x in rows])
            own = float((first[at] * second[at]).sum() / (((first + second) / 2)[at] ** 2).sum())
            assert share[at].tolist() == pytest.approx([min(max(own, 0.0), 1.0)] * int(at.sum()))
    assert torch.equal(nl.agreement(first, first), torch.ones(shape, dtype=torch.float64))
    assert nl.agreement(first, -first).abs().max() == 0
    # A signal in one corner under noise: there nearly all is kept, elsewhere little.
    noisy = torch.zeros(80, 80, dtype=torch.float64)
    noisy[:10, :10] = 5
    share = nl.agreement(noisy + torch.randn(80, 80), noisy + torch.randn(80, 80))
    assert share[0, 0] > 0.95 and share.mean() < 0.15


def test_the_search_finds_the_lowest_step():
    def loss(best: float, asked: list[float]):
        def trial(size: float) -> float:
            asked.append(size)
            return (size - best) ** 2 / best**2

        return trial

    for best in (1.0, 3.0, 30.0, 0.1):
        asked: list[float] = []
        size, low = ng.search(loss(best, asked), 1.0, 1.0)
        assert (
            low < 0.05
            and low == pytest.approx((size - best) ** 2 / best**2)
            and low == min((a - best) ** 2 / best**2 for a in asked)
        )
    asked = []
    assert ng.search(loss(-1.0, asked), 1.0, 1.0) == (0.0, 1.0) and len(asked) == ng.HALVINGS + 1
    assert ng.search(lambda size: float("nan"), 1.0, 1.0) == (0.0, 1.0)


def small_job(dtype: torch.dtype = torch.float32, **settings: Any) -> Job:
    dense = make_model(dtype=dtype)
    ids = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
    windows = TokenWindows(ids, "random tokens")
    small = factorize(
        make_model(dtype=dtype), tokenizer=make_tokenizer(), texts=[TEXT], keep=0.5, tokens=320, window=32, quiet=True
    )
    replaced = {e.name: dense.get_submodule(e.name) for e in small.twofold_plan.entries if e.rank is not None}
    recipe = make_recipe({"model": "x", "keep": 0.5, **settings})
    loaded = LoadedModel(small, None, "x", None, dtype)
    objective = OBJECTIVES.get("two-sided")
    causal = TASKS.get("causal-lm")
    return Job(loaded, replaced, small.twofold_plan, None, objective, windows, windows[:2], causal, recipe, quiet=True)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_gradient_is_that_of_the_whole_weights(share):
    job = small_job(torch.float64, refine_labels=share)
    names = list(job.replaced)
    loss = Likeness(job)
    with training(job.model, {}):
        halves = [sum_half(job, loss, names, 0, half, "") for half in (0, 1)]
    with torch.no_grad():
        mean = sum(float(loss([i])) for i in range(6)) / 6
    assert sum(total for _, total in halves) / 6 == pytest.approx(mean, rel=1e-6)
    # The same with dense layers whose weights ask for gradients.
    for name in names:
        layer = job.model.get_submodule(name)
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float64)
        dense.weight.data.copy_(layer.to_dense())
        replace_module(job.model, name, dense)
    job.model.requires_grad_(False)
    total = torch.zeros(())
    for name in names:
        job.model.get_submodule(name).weight.requires_grad_(True)
    for i in range(6):
        total = total + loss([i]) * 24
    total.backward()
    for name in names:
        whole = job.model.get_submodule(name).weight.grad
        first, second = (sums[f"gradient/{name}"] for sums, _ in halves)
        torch.testing.assert_close((first + second).double(), whole, rtol=1e-6, atol=1e-9)
        assert (second - first).abs().max() > 0  # the halves are not of the same text
    leaders = {key.removeprefix("input/") for key in halves[0][0] if key.startswith("input/")}
    assert leaders == {entry.group for entry in job.plan.entries}


@pytest.mark.long
def test_it_lowers_the_divergence_and_keeps_the_size(checkpoint, text_file, tmp_path):
    run = compress(
        recipe_of(checkpoint, text_file, refine="natural-gradient", refine_rounds=2), tmp_path / "out", quiet=True
    )
    plain = compress(recipe_of(checkpoint, text_file, refine=[]), tmp_path / "plain", quiet=True)
    (refined,) = run.refinement
    assert refined.loss_after < 0.95 * refined.loss_before
    assert refined.planned == 2 and 1 <= refined.steps <= 2 and refined.tokens == refined.steps * 640
    assert (
        run.parameters_after == plain.parameters_after
    )  # not the bytes: rows and columns have orders of other lengths
    model = load_model(str(tmp_path / "out")).model
    ranks = {n: m.rank for n, m in model.named_modules() if isinstance(m, FactoredLinear)}
    like = {
        n: m.rank for n, m in load_model(str(tmp_path / "plain")).model.named_modules() if isinstance(m, FactoredLinear)
    }
    assert ranks and ranks == like


@pytest.mark.long
@pytest.mark.parametrize("settings", [{"form": "plain"}, {"objective": "svd-llm"}, {"objective": "svd"}])
def test_it_works_on_every_pair_of_factors(checkpoint, text_file, tmp_path, settings):
    recipe = recipe_of(checkpoint, text_file, refine="natural-gradient", **settings)
    (refined,) = compress(recipe, tmp_path / "out", quiet=True).refinement
    assert refined.loss_after < refined.loss_before


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_other_layouts_and_biases(architecture, text_file, tmp_path):
    folder = tmp_path / "model"
    make_model(architecture).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (refined,) = compress(
        recipe_of(folder, text_file, refine="natural-gradient"), tmp_path / "out", quiet=True
    ).refinement
    assert refined.loss_after < refined.loss_before


@pytest.mark.slow
def test_what_it_begins_from_is_part_of_its_state(checkpoint, text_file, tmp_path):
    """Kill a run after a round, and run it again with another training before: the round is not taken up."""

    def flags(out: str, passes: str) -> list[str]:
        chain = ["--refine", "distill,natural-gradient", "--refine-passes", passes]
        return [*command(checkpoint, text_file, tmp_path / out), *chain]

    kill_program(flags("out", "1"), tmp_path / "cache", "*/1-natural-gradient/round-0*")
    for out in ("out", "whole"):
        run_program(flags(out, "2"), tmp_path / "cache")
    same(tmp_path / "out", tmp_path / "whole")


def test_layers_that_are_called_on_some_tokens_or_twice():
    """Average C over the rows that a layer was given, and G over the tokens: two calls are not counted four times."""
    job = small_job(torch.float64)
    loss, names = Likeness(job), list(job.replaced)
    twice = next(name for name in names if name.endswith("down_proj"))
    mlp = job.model.get_submodule(twice.rpartition(".")[0])

    def apart(x: Tensor) -> Tensor:  # the same outputs, by a call for each half of the hidden units
        hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        even = torch.arange(hidden.shape[-1]) % 2 == 0
        return mlp.down_proj(hidden * even) + mlp.down_proj(hidden * ~even)

    mlp.forward = apart
    with training(job.model, {}):
        sums = [sum_half(job, loss, names, 0, half, "")[0] for half in (0, 1)]
    leader = next(e.group for e in job.plan.entries if e.name == twice)
    tokens = job.samples.predictions
    rows, inputs = (sums[0][f"{kind}/{leader}"] + sums[1][f"{kind}/{leader}"] for kind in ("rows", "input"))
    assert int(rows) == 2 * tokens
    step = ng._steps(job, names, sums, [tokens // 2, tokens // 2])[twice]
    basis = nl.Basis.of((inputs / (2 * tokens)).double(), ng.DAMPING)
    torch.testing.assert_close(step.right.T, basis.vectors / basis.roots)


def test_layers_without_a_gradient_stay_and_are_named():
    job = small_job()
    mlp = job.model.model.layers[1].mlp
    mlp.forward = lambda x: torch.zeros_like(x)  # its layers are never called
    refined = natural_gradient(job)
    assert refined.steps == 1 and refined.loss_after < refined.loss_before
    moved = sum(
        p.numel() for n in job.replaced if "layers.1.mlp" not in n for p in job.model.get_submodule(n).parameters()
    )
    assert refined.parameters == moved
    assert any("3 layers get no gradient" in note and "layers.1.mlp" in note for note in job.plan.notes)


@pytest.mark.long
def test_models_that_work_in_place_on_a_projection(text_file, tmp_path):
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, clip_qkv=0.5, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    model = OlmoForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    recipe = recipe_of(tmp_path / "model", text_file, refine="natural-gradient,distill", refine_steps=3)
    first, second = compress(recipe, tmp_path / "out", quiet=True).refinement
    assert first.loss_after < first.loss_before and second.steps == 3


def test_it_keeps_the_time_after_its_first_round():
    refined = natural_gradient(replace(small_job(refine_rounds=5), seconds=1e-3))
    assert refined.steps == 1 and refined.planned == 5 and "longer than there is time" in refined.ended


def test_one_window_alone_is_said():
    job = replace(small_job(), samples=TokenWindows(torch.arange(24)[None], "one window"))
    natural_gradient(job)
    assert any("one window alone has no halves" in note for note in job.plan.notes)


def test_halves_that_agree_on_nothing_move_nothing(monkeypatch):
    job = small_job()
    true = ng.natural_step
    monkeypatch.setattr(ng, "natural_step", lambda *a: ng.Step(**{**vars(true(*a)), "agreed": -1.0}))
    refined = natural_gradient(job)
    assert refined.steps == 0 and refined.ended == "the two halves of the tokens agree on no step of round 1"
    assert refined.parameters == 0


def test_a_step_that_does_not_help_is_not_taken(monkeypatch):
    job = small_job()
    before = {n: job.model.get_submodule(n) for n in job.replaced}
    true = ng.natural_step
    monkeypatch.setattr(ng, "natural_step", lambda *a: ng.Step(**{**vars(s := true(*a)), "direction": -s.direction}))
    refined = natural_gradient(job)
    assert refined.steps == 0 and refined.loss_after == refined.loss_before
    assert refined.ended == "no step of round 1 helps on held-out text"
    assert all(job.model.get_submodule(n) is before[n] for n in before)


def test_a_layer_without_a_bounded_form_stays_and_is_named(monkeypatch):
    job = small_job()
    stays = next(iter(job.replaced))
    old, true = job.model.get_submodule(stays), ng._layer
    monkeypatch.setattr(
        ng, "_layer", lambda step, size, was, dtype: None if was is old else true(step, size, was, dtype)
    )
    assert natural_gradient(job).steps == 1
    assert job.model.get_submodule(stays) is old
    assert any("1 layers had no bounded gauge form" in note and stays in note for note in job.plan.notes)


def test_gradients_that_are_no_numbers_are_named(monkeypatch):
    job = small_job()
    name = next(iter(job.replaced))
    job.model.get_submodule(name).register_forward_hook(lambda m, a, out: out * float("nan"))
    with pytest.raises(TwofoldError, match="in the factored model is NaN or infinite"):
        natural_gradient(job)


def test_weights_that_are_cut_together_are_refused(checkpoint, text_file, tmp_path):
    with pytest.raises(TwofoldError, match="use `refine=distill`"):
        compress(
            recipe_of(checkpoint, text_file, refine="natural-gradient", objective="modegpt"),
            tmp_path / "out",
            quiet=True,
        )
    with pytest.raises(TwofoldError, match="`refine_rounds`"):
        recipe_of(checkpoint, text_file, refine="natural-gradient", refine_rounds=0)


def test_the_estimate_counts_it(checkpoint, monkeypatch):
    speeds = functools.cache(lambda: probe(*seen[0]))
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "twofold.run.estimate.estimate.probe", lambda *a: seen.append(a) or speeds()
    )  # once, so that they are the same
    estimates = {}
    for rounds in (0, 1, 3):
        more = {"refine": "natural-gradient", "refine_rounds": rounds} if rounds else {}
        estimates[rounds] = plan_of(make_recipe({"model": str(checkpoint), "keep": 0.7, **more})).estimate
    once, three = (estimates[rounds].seconds["refine"] for rounds in (1, 3))
    assert once > 0.3 and 1.5 * once < three < 3 * once and "refine" not in estimates[0].seconds
    # Two gradients and two pairs of moments of every weight, on the disk and in memory.
    targets = find_targets(load_skeleton(str(checkpoint)).model).targets
    numbers = sum(t.size + t.out_features**2 + t.in_features**2 for t in targets)
    assert estimates[1].work_bytes - estimates[0].work_bytes == 8 * numbers
    assert estimates[1].memory["refine"] > 8 * numbers
