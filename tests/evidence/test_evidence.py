"""What is measured on the model for an allocation: truncated weights, scores, second-order losses, moments once more."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import twofold
import twofold.evidence.truncated as truncated
from conftest import TEXT, make_model, make_tokenizer
from twofold.allocate.sensitivity import GRID
from twofold.comparison.arena import compare
from twofold.comparison.grid import make_grid
from twofold.errors import TwofoldError
from twofold.evidence.base import Measurement
from twofold.evidence.first_order import component_scores
from twofold.host.clock import Stopwatch
from twofold.linalg.gauge import gauge_rank
from twofold.linalg.spectrum import truncate
from twofold.model.kinds import dense_weight
from twofold.planning.plan import Plan
from twofold.recipe import make_recipe
from twofold.run.compress import compress
from twofold.run.open import open_for
from twofold.run.plan import plan as plan_of
from twofold.run.prepare import prepare
from twofold.task.output.curvature import loss_gradient

SMALL = {"tokens": 128, "window": 32, "quiet": True}


def prepared_of(architecture, tmp_path, text_file, **settings):
    folder = tmp_path / architecture
    make_model(architecture, dtype=torch.float64).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    recipe = make_recipe({"model": str(folder), "calibration": [str(text_file)], "keep": 0.7, "tokens": 128, "window": 32,
        "dtype": "float64", **settings})  # fmt: skip
    return recipe, prepare(recipe, open_for(recipe, quiet=True), Stopwatch(), quiet=True)


def mean_loss(model, windows):
    losses = [torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:]) for ids in windows]
    return sum(losses) / len(losses)


@pytest.mark.long
@pytest.mark.parametrize("objective", ["two-sided", "svd-llm", "svd"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_scores_are_the_gradient_times_each_component(architecture, objective, tmp_path, text_file):
    _, prepared = prepared_of(architecture, tmp_path, text_file, objective=objective, allocate="zero-sum")
    model, windows = prepared.loaded.model, prepared.data.samples.ids
    modules = {t.name: model.get_submodule(t.name) for t in prepared.targets.targets}
    assert not any(p.grad is not None for p in model.parameters())
    for module in modules.values():
        module.weight.requires_grad_(True)
    mean_loss(model, windows).backward()
    sides = set()
    for target in prepared.targets.targets:
        module = modules[target.name]
        gradient = (module.weight.grad.T if target.transposed else module.weight.grad).detach()
        problem = prepared.decomposition.problem(model, target)
        spectrum = prepared.decomposition.spectrum(target, problem)
        sides.add(spectrum.side)
        weight, before = dense_weight(module).detach(), 0.0
        expected = []
        for rank in range(1, spectrum.numerical_rank + 1):
            left, right = truncate(weight, spectrum, problem.metric, rank)
            now = float((gradient * (left @ right)).sum())
            expected.append(before - now)
            before = now
        scores = prepared.evidence.measured[target.name]
        scale = max(map(abs, expected))
        assert len(scores) == len(spectrum.values)
        assert scores[: len(expected)] == pytest.approx(expected, abs=1e-4 * scale)
        # Without every component the weight is zero: the change is that of the whole weight.
        assert scores.sum() == pytest.approx(-float((gradient * weight).sum()), abs=1e-3 * scale)
    assert sides == {"rows", "columns"}


def test_a_score_tells_the_change_of_the_loss(tmp_path, text_file):
    _, prepared = prepared_of("llama", tmp_path, text_file, objective="svd-llm", allocate="zero-sum")
    model, windows = prepared.loaded.model, prepared.data.samples.ids
    target = prepared.targets.targets[0]
    problem = prepared.decomposition.problem(model, target)
    spectrum = prepared.decomposition.spectrum(target, problem)
    module = model.get_submodule(target.name)
    component = torch.matmul(*truncate(module.weight.detach(), spectrum, problem.metric, 1))
    with torch.no_grad():
        step = 0.02  # norms and softmax are taken in float32, so a smaller one would drown
        module.weight.sub_(step * component)
        less = mean_loss(model, windows)
        module.weight.add_(2 * step * component)
        more = mean_loss(model, windows)
    assert float(less - more) / (2 * step) == pytest.approx(prepared.evidence.measured[target.name][0], rel=0.02)


def test_the_model_is_left_as_it_was(tmp_path, text_file):
    recipe, prepared = prepared_of("llama", tmp_path, text_file, allocate="uniform")
    model = prepared.loaded.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    task, targets, samples = prepared.opened.task, prepared.targets.targets, prepared.data.samples
    component_scores(Measurement(model, task, targets, samples, prepared.decomposition, recipe, quiet=True))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.long
@pytest.mark.parametrize("form", ["gauge", "plain"])
def test_sensitivities_are_the_perplexities_of_truncated_weights(form, tmp_path, text_file):
    settings = {"allocate": "sensitivity", "form": form, "sensitivity_windows": 2}
    _, prepared = prepared_of("gpt2", tmp_path, text_file, **settings)
    model = prepared.loaded.model
    fresh = make_model("gpt2", dtype=torch.float64)
    assert all(torch.equal(p, dict(fresh.named_parameters())[name]) for name, p in model.named_parameters())
    for target in (prepared.targets.targets[0], prepared.targets.targets[-1]):
        m, n = target.out_features, target.in_features
        problem = prepared.decomposition.problem(model, target)
        spectrum = prepared.decomposition.spectrum(target, problem)
        module = fresh.get_submodule(target.name)
        weight = dense_weight(module).detach().clone()
        for share, perplexity in zip(GRID, prepared.evidence.measured[target.name], strict=True):
            rank = max(int(share * m * n / (m + n)) if form == "plain" else gauge_rank(m, n, share * m * n), 1)
            left, right = truncate(weight, spectrum, problem.metric, rank)
            with torch.no_grad():
                module.weight.copy_((left @ right).T)
                expected = math.exp(float(mean_loss(fresh, prepared.data.samples.ids[:2])))
                module.weight.copy_(weight.T)
            assert perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("objective", ["two-sided", "svd"])
@pytest.mark.parametrize("allocate", ["svd-llm-v2", "sensitivity", "zero-sum"])
def test_the_whole_job(allocate, objective):
    model = twofold.factorize(
        make_model(), make_tokenizer(), keep=0.6, objective=objective, allocate=allocate, texts=[TEXT], **SMALL
    )
    plan = model.twofold_plan
    assert 0.5 < plan.keep <= 0.6 + 1e-9
    assert len({e.rank for e in plan.entries}) > 1
    logits = model(input_ids=torch.arange(20)[None]).logits
    assert torch.isfinite(logits).all()


@pytest.mark.long
def test_sensitivities_are_measured_once_for_every_budget_and_taken_up_after_a_stop(
    checkpoint, text_file, tmp_path, monkeypatch
):
    measured, stops = [], [True]
    perplexity = truncated._perplexity

    def stopping(*arguments):
        measured.append(1)
        if len(measured) == 30 and stops:
            stops.clear()
            raise RuntimeError("stopped")
        return perplexity(*arguments)

    monkeypatch.setattr(truncated, "_perplexity", stopping)
    given = {
        "model": str(checkpoint),
        "calibration": [str(text_file)],
        "tokens": 128,
        "window": 32,
        "allocate": "sensitivity",
    }
    with pytest.raises(RuntimeError, match="stopped"):
        plan_of(make_recipe({**given, "keep": 0.6}), quiet=True)
    plan = plan_of(make_recipe({**given, "keep": 0.6}), quiet=True)
    assert len(measured) == 30 + (14 - 3) * len(GRID)  # three of the fourteen weights were whole
    measured.clear()
    run = compress(make_recipe({**given, "keep": 0.8}), tmp_path / "a", quiet=True)
    assert not measured and plan.keep <= 0.6 < run.keep <= 0.8
    compress(make_recipe({**given, "perplexity_at_most": "1.2x"}), tmp_path / "b", quiet=True)
    assert not measured
    plan_of(make_recipe({**given, "keep": 0.8, "sensitivity_windows": 2}), quiet=True)
    assert len(measured) == 14 * len(GRID)
    for path in (tmp_path / "cache" / "sensitivity").iterdir():
        path.write_text(json.dumps({"mark": "other"}))
    measured.clear()
    assert plan_of(make_recipe({**given, "keep": 0.6}), quiet=True) == plan and len(measured) == 14 * len(GRID)


@pytest.mark.parametrize("allocate", ["sensitivity", "zero-sum"])
def test_what_can_not_be_measured_is_refused(allocate, checkpoint, text_file, tmp_path):
    given = {"model": str(checkpoint), "calibration": [str(text_file)], "keep": 0.6, "allocate": allocate, "window": 32}
    with pytest.raises(twofold.TwofoldError, match="worked through block by block"):
        compress(make_recipe({**given, "stream": "always"}), tmp_path / "a", quiet=True)
    assert not (tmp_path / "cache").exists()


def test_overflow_counts_as_the_worst():
    from twofold.allocate import Candidate
    from twofold.allocate.sensitivity import within

    ranks, values = np.arange(1, 40), np.ones(40)
    costs = ranks * (80.0 - ranks)
    table = np.array([math.inf, 9.0, 8, 7, 6, 5, 4, 3, 2])
    candidate = Candidate("a", ranks, costs, 40.0 - ranks, 1600.0, 1600.0, values, measured=table)
    assert 160 < within(candidate, 9.0).cost(candidate) <= 320 < within(candidate, 8.5).cost(candidate)
    assert within(candidate, 1.0).index is None


def gradients(model, names, windows, seed=0):
    """Return the inputs and the gradients at the outputs (tokens, ·) of some modules, kept by autograd."""
    calls_of = {name: [] for name in names}

    def keeping(name):
        def hook(module, args, output):
            output.retain_grad()
            calls_of[name].append((args[0], output))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keeping(name)) for name in names]
    for i, ids in enumerate(windows):
        logits = model(input_ids=ids[None]).logits[0]
        logits.backward(loss_gradient(logits, None, torch.Generator().manual_seed(seed * 1_000_003 + i)))
    for handle in handles:
        handle.remove()
    return {
        name: tuple(torch.cat([part.detach().flatten(0, -2) for part in parts])
                    for parts in ([x for x, _ in calls], [y.grad for _, y in calls]))
        for name, calls in calls_of.items()
    }  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_by_rank_are_those_of_the_truncated_weight_token_by_token(architecture, tmp_path, text_file):
    _, prepared = prepared_of(architecture, tmp_path, text_file, allocate="measured")
    model, windows = prepared.loaded.model, prepared.data.samples.ids
    passed = gradients(model, [t.name for t in prepared.targets.targets], windows)
    sides = set()
    for target in prepared.targets.targets:
        x, g = passed[target.name]
        problem = prepared.decomposition.problem(model, target)
        spectrum = prepared.decomposition.spectrum(target, problem)
        sides.add(spectrum.side)
        weight = dense_weight(model.get_submodule(target.name)).detach()
        curve = prepared.evidence.measured[target.name]
        for rank in (0, 3, 15, len(curve) - 1):
            left, right = (
                truncate(weight, spectrum, problem.metric, rank) if rank else (torch.zeros(len(weight), 1),) * 2
            )
            rest = weight - (left @ right if rank else 0)
            expected = (g * (x @ rest.T)).sum(1).square().sum() / (2 * windows.numel())
            # The bases are kept in float32.
            assert curve[rank] == pytest.approx(float(expected), rel=2e-5, abs=1e-9 * curve[0])
    assert sides == {"rows", "columns"}


@pytest.mark.long
def test_measured_losses_decide_the_ranks(tmp_path, text_file):
    _, prepared = prepared_of("llama", tmp_path, text_file, allocate="measured")
    _, plain = prepared_of("llama", tmp_path, text_file)
    assert prepared.plan.keep <= 0.7 and plain.plan.keep <= 0.7
    assert [e.rank for e in prepared.plan.entries] != [e.rank for e in plain.plan.entries]

    def lost(plan):
        ranks = {e.name: e.rank for e in plan.entries if e.rank is not None}
        return sum(np.minimum.accumulate(prepared.evidence.measured[name])[rank] for name, rank in ranks.items())

    assert lost(prepared.plan) < lost(plain.plan)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_moments_are_measured_again_on_the_factored_model(architecture, tmp_path, text_file):
    _, once = prepared_of(architecture, tmp_path, text_file)
    _, twice = prepared_of(architecture, tmp_path, text_file, allocate="global-iterated")
    model, windows = once.loaded.model, once.data.samples.ids
    weights = {t.name: dense_weight(model.get_submodule(t.name)).detach() for t in once.targets.targets}
    for name, module in dict(twice.loaded.model.named_modules()).items():
        if name in weights:  # the model is dense again
            torch.testing.assert_close(dense_weight(module), weights[name], rtol=0, atol=0)
    once.factorize(quiet=True)
    passed = gradients(model, list(weights), windows)
    for name, weight in weights.items():
        x, g = passed[name]
        layer, before = twice.moments.layer(name), once.moments.layer(name)
        tokens = windows.numel()
        direct = {
            "input": x.T @ x, "output": (x @ weight.T).T @ (x @ weight.T), "gradient": g.T @ g,
            "input_gradient": (g @ weight).T @ (g @ weight),
        }  # fmt: skip
        kinds = [kind for kind in direct if getattr(layer, kind) is not None]
        assert len(kinds) == 2
        for kind in kinds:
            expected = (2 * getattr(before, kind) + direct[kind] / tokens) / 3
            torch.testing.assert_close(getattr(layer, kind), expected, rtol=1e-6, atol=1e-9)
    assert twice.moments.fingerprint != once.moments.fingerprint


@pytest.mark.long
def test_moments_of_a_killed_run_are_not_measured_a_third_time(tmp_path, text_file, monkeypatch):
    folder = tmp_path / "llama"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    recipe = make_recipe({"model": str(folder), "calibration": [str(text_file)], "keep": 0.7, "tokens": 128, "window": 32,
        "allocate": "global-iterated", "eval_windows": 0})  # fmt: skip
    whole = compress(recipe, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("twofold.factor.recalibrate.make_plan", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(recipe, tmp_path / "small", quiet=True)
    assert (tmp_path / "small.partial" / "recalibrated" / "moments.json").is_file()
    monkeypatch.setattr("twofold.factor.recalibrate.collect_moments", lambda *a, **k: 1 / 0)
    again = compress(recipe, tmp_path / "small", quiet=True)
    assert again.predicted_divergence == whole.predicted_divergence
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "small")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "svd"}, "does not give"), ({"objective": "svd-llm"}, "does not give"),
        ({"allocate": "sensitivity", "bits": 4}, "counts numbers of floating point, and `bits=4` rounds them"),
        ({"allocate": "sensitivity", "keep": None, "latency": 0.7}, "which a budget in time does not count by"),
        ({"allocate": "global", "dense_bits": 8, "refine": "anchored"}, "and `dense_bits=8` rounds some to integers; use"),
        ({"keep": None, "kl_at_most": 0.1}, "at its size, which `kl_at_most=0.1` does not say; use"),
        ({"stream": "always"}, "block by block"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(settings, words, checkpoint, text_file, tmp_path):
    given = {"model": str(checkpoint), "calibration": [str(text_file)], "keep": 0.7, "allocate": "global-iterated"}
    with pytest.raises(TwofoldError, match=words):
        compress(
            make_recipe({k: v for k, v in {**given, **settings}.items() if v is not None}), tmp_path / "o", quiet=True
        )


@pytest.mark.long
def test_another_curvature_is_another_calibration(checkpoint, text_file):
    plans = {}
    for curvature in ("sampled", "gauss-newton", "empirical"):
        recipe = make_recipe({"model": str(checkpoint), "calibration": [str(text_file)], "keep": 0.7, "tokens": 128,
            "window": 32, "curvature": curvature})  # fmt: skip
        prepared = prepare(recipe, open_for(recipe, quiet=True), Stopwatch(), quiet=True)
        plans[curvature] = prepared.moments.fingerprint, prepared.plan.predicted_divergence
    assert len(set(plans.values())) == 3 and len({mark for mark, _ in plans.values()}) == 3


@pytest.mark.long
def test_the_estimate_counts_what_an_allocation_measures(checkpoint):
    seconds = {}
    for allocate in ("global", "sensitivity", "zero-sum", "measured", "global-iterated"):
        seconds[allocate] = plan_of(
            make_recipe({"model": str(checkpoint), "keep": 0.7, "allocate": allocate})
        ).estimate.seconds
    own = {name: stages.get("sensitivities", stages.get("recalibrate", 0)) for name, stages in seconds.items()}
    assert own.pop("global") == 0 and all(value > 0 for value in own.values()), own
    assert "recalibrate" in seconds["global-iterated"]
    assert own["measured"] == pytest.approx(seconds["measured"]["calibrate"], rel=0.5)


@pytest.mark.long
def test_moments_are_measured_again_where_the_rest_is_of_integers(checkpoint, text_file, tmp_path):
    given = {"model": str(checkpoint), "calibration": [str(text_file)], "keep": 0.7, "tokens": 128, "window": 32}
    recipe = make_recipe({**given, "allocate": "global-iterated", "dense_bits": 8, "eval_windows": 1})
    run = compress(recipe, tmp_path / "small", quiet=True)
    assert run.quality.factored["divergence"] < 5
    assert any(entry.bits == 8 for entry in Plan.load(tmp_path / "small" / "plan.json").dense)


@pytest.mark.long
def test_the_order_of_objectives_refuses_nothing(checkpoint, text_file, tmp_path):
    grid = make_grid({"model": str(checkpoint), "calibration": [str(text_file)], "objectives": "whitened+rows,two-sided",
        "allocate": "global-iterated", "keep": "0.8", "tokens": 128, "window": 32, "baselines": "none"})  # fmt: skip
    rows = compare(grid, tmp_path / "arena", quiet=True).rows
    assert [row.skipped is None for row in rows] == [True, False, True]
