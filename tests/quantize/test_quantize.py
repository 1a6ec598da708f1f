"""Factors in integers: their loss, rank and bits chosen together, corrections, and checkpoints that load to the bit."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, RobertaConfig, RobertaForMaskedLM

import tiny
import twofold
from conftest import ARCHITECTURES, TEXT, make_model, make_tokenizer
from twofold import TwofoldError
from twofold.checkpoint.plugin import FORMAT_VERSION
from twofold.evaluation.evaluate import evaluate
from twofold.evaluation.size import parameter_count
from twofold.evidence.rounding import AUTO_BITS, Rounding
from twofold.linalg.metric import damp
from twofold.linalg.spectrum import gram, smaller_side, spectrum_of, truncate, weighted_low_rank
from twofold.model.target import Target, Targets
from twofold.nn.int_matrix import IntLinear, IntMatrix
from twofold.nn.layers.corrected import CorrectedLinear
from twofold.nn.layers.embedding import QuantizedEmbedding
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.quantized import QuantizedLinear
from twofold.objectives import OBJECTIVES, LayerMoments
from twofold.planning.bits import Option, bit_options, pareto
from twofold.planning.evidence import Evidence
from twofold.planning.menu import PlanRequest
from twofold.quantize.factors import factor_bytes, integer_factors, integer_form
from twofold.quantize.loss import error_loss, factors_loss, far_diagonal, rounding_needs
from twofold.quantize.rounding import round_matrix
from twofold.recipe import make_recipe
from twofold.run.inspect import inspect

IDS = torch.arange(20)[None]
SHAPES = [(48, 80), (80, 48), (56, 56)]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def stored_bytes(folder):
    """Return the bytes of all tensors in the weight files of a folder."""
    tensors = [tensor for path in folder.glob("model*.safetensors") for tensor in load_file(path).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def factorized(architecture="llama", **settings):
    settings = {"texts": [TEXT], "tokens": 128, "window": 32, "quiet": True} | settings
    return twofold.factorize(make_model(architecture), make_tokenizer(), **settings)


def problem_of(shape, seed=0):
    """A weight with a spectrum that falls, its damped metrics G and C, and its decomposition."""
    torch.manual_seed(seed)
    m, n = shape
    k = min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, k, dtype=torch.float64))[0] for size in shape)
    weight = (left * torch.linspace(0, -3, k, dtype=torch.float64).exp()) @ right.T
    x = torch.randn(400, n, dtype=torch.float64) * torch.linspace(0.3, 2, n, dtype=torch.float64)
    g = torch.randn(400, m, dtype=torch.float64) * torch.linspace(2, 0.3, m, dtype=torch.float64)
    c, e = damp(x.T @ x / 400, 1e-2), damp(g.T @ g / 400, 1e-2)
    side = smaller_side(m, n)
    near, other = (e, c) if side == "rows" else (c, e)
    return weight, e, c, near, other, side, spectrum_of(near, gram(weight, other), side)


def true_loss(error, g, c):
    """tr(G E C Eᵀ)."""
    return float(((g @ error @ c) * error).sum())


# ---------------------------------------------------------------------------------------------------- factors and their loss


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_measured_loss_is_that_of_the_stored_product(shape, bits):
    weight, g, c, near, other, side, spectrum = problem_of(shape)
    form = integer_form("gauge", bits, *shape)
    assert form == (side if bits == 8 else "plain")
    group = None if bits == 8 else 64
    made = integer_factors(weight, spectrum, near, 20, form, bits, group)
    layer = made.layer(None, False, torch.float32)
    assert layer.quantized_bytes == factor_bytes(form, *shape, 20, bits, group)
    product = layer.to_dense(torch.float64)
    truth = true_loss(weight - product, g, c)
    found = factors_loss(made, near, side, gram(weight, other), other.diagonal())
    assert found == pytest.approx(truth, rel=0.12)  # the far metric by its diagonal
    # With the far metric really diagonal the expectation is nearer; the truncation alone is exact.
    assert found >= float(spectrum.tails[20]) * 0.999


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_that_are_rounded_with_care_lose_less_than_rounded_ones(shape):
    weight, g, c, near, _, _, spectrum = problem_of(shape)
    for bits in (4, 3):
        made = integer_factors(weight, spectrum, near, 24, "plain", bits, 64)
        careful = true_loss(weight - made.layer(None, False, torch.float32).to_dense(torch.float64), g, c)
        float_layer = FactoredLinear.from_factors(*truncate(weight, spectrum, near, 24), form="plain")
        a, b = (round_matrix(w.weight, bits, 64, IntLinear).weight for w in (float_layer.expand, float_layer.reduce))
        plain = true_loss(weight - a.double() @ b.double(), g, c)
        assert careful < plain, (bits, careful, plain)


def test_many_bits_lose_what_truncation_does():
    for shape in SHAPES:
        weight, g, c, near, _, side, spectrum = problem_of(shape)
        made = integer_factors(weight, spectrum, near, 10, side, 8, None)
        error = weight - made.layer(None, False, torch.float32).to_dense(torch.float64)
        assert true_loss(error, g, c) == pytest.approx(float(spectrum.tails[10]), rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_of_a_rounded_dense_weight_is_well_estimated(shape):
    weight, g, c, near, other, side, _ = problem_of(shape)
    error = weight - round_matrix(weight, 4, 64, IntLinear).weight
    assert error_loss(error, near, side, other.diagonal()) == pytest.approx(true_loss(error, g, c), rel=0.1)


def test_the_diagonal_of_the_far_metric_comes_from_calibration_and_is_damped():
    moments = LayerMoments(input_square=torch.arange(1.0, 7.0), gradient_square=torch.arange(1.0, 9.0))
    wide, tall = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(8, 6, dtype=torch.float64)
    two = OBJECTIVES.get("two-sided")
    torch.testing.assert_close(far_diagonal(wide, moments, two, 0.1), torch.arange(1.0, 7.0).double() + 0.35)
    torch.testing.assert_close(far_diagonal(tall, moments, two, 0.0), torch.arange(1.0, 9.0).double())
    assert torch.equal(far_diagonal(tall, moments, OBJECTIVES.get("svd-llm"), 0.1), torch.ones(8, dtype=torch.float64))
    assert far_diagonal(wide, moments, OBJECTIVES.get("asvd"), 0.1) is None
    assert rounding_needs(two) == {"input_square", "gradient_square"} and not rounding_needs(OBJECTIVES.get("svd"))


def test_calibration_sums_the_diagonals_of_the_moments_themselves():
    from twofold.calibrate.moments import Moments
    from twofold.calibrate.request import request_statistics
    from twofold.calibrate.sweep import collect_moments
    from twofold.model.streamed import Resident
    from twofold.model.weights import find_targets
    from twofold.task import TASKS
    from twofold.task.text.texts import TokenWindows

    model = make_model()
    targets = find_targets(model).targets
    needs = {"input", "gradient", "input_square", "gradient_square"}
    request = request_statistics(targets, {}, needs, both_sides=True)
    windows = torch.randint(0, 255, (2, 24), generator=torch.Generator().manual_seed(0))
    empty, task = Moments({}, 0, {}, ""), TASKS.get("causal-lm")
    found = collect_moments(
        Resident(model), targets, request, TokenWindows(windows, "text"), task, empty=empty, quiet=True
    )
    for target in targets:
        layer = found.layer(target.name)
        torch.testing.assert_close(layer.input_square, layer.input.diagonal())
        torch.testing.assert_close(layer.gradient_square, layer.gradient.diagonal())


# --------------------------------------------------------------------------------------------------- rank and bits together


def test_options_are_what_no_other_beats_and_cost_all_their_bytes():
    made = [Option(3, 4, 100, 1.0), Option(None, 8, 200, 0.1), Option(5, 4, 150, 1.0), Option(2, 8, 100, 2.0)]
    assert pareto(made) == [made[0], made[1]]
    target = Target("a.q_proj", 40, 64, False, False)
    tails = np.append(np.cumsum((0.7 ** np.arange(40.0))[::-1])[::-1], 0.0)
    rounding = Rounding(
        {bits: 4.0 ** -(bits + 2) for bits in AUTO_BITS},
        np.array([3, 12, 36]),
        {bits: np.full(3, 4.0 ** -(bits + 2)) for bits in AUTO_BITS},
    )
    recipe = make_recipe({"model": "m", "budget": "1MB", "bits": "auto"})
    request = PlanRequest(Targets([target], []), None, recipe, 4, Evidence(rounding={target.name: rounding}))
    options = bit_options(request, target, tails, None)
    costs, losses = [o.bytes for o in options], [o.loss for o in options]
    assert costs == sorted(set(costs)) and losses == sorted(set(losses), reverse=True)
    assert any(o.rank is None for o in options) and len({o.bits for o in options}) > 2
    for option in options:
        if option.rank is not None:
            form = integer_form("gauge", option.bits, 40, 64)
            group = recipe.group(option.bits)
            order = 4 * 40 if form == "rows" else 0
            assert option.bytes == factor_bytes(form, 40, 64, option.rank, option.bits, group) + order + 4
            expected = tails[option.rank] + 4.0 ** -(option.bits + 2) * (tails[0] - tails[option.rank])
            assert option.loss == pytest.approx(expected)


@pytest.fixture(scope="module")
def dense_bytes():
    return sum(p.numel() for p in make_model().parameters()) * 4


@pytest.mark.long
@pytest.mark.parametrize("share", [0.2, 0.35, 0.6])
def test_a_budget_is_met_never_exceeded_and_used(share, dense_bytes, tmp_path):
    budget = int(dense_bytes * share)
    model = factorized(budget=f"{budget / 1e3}KB", bits="auto")
    plan = model.twofold_plan
    model.save_pretrained(tmp_path)
    used = stored_bytes(tmp_path)
    assert used == plan.bytes_after  # no buffer is stored beside the plan's
    assert 0.99 * budget <= used <= budget or all(e.bits in (8, None) for e in plan.entries)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    for entry in plan.entries:
        if entry.bits is not None:
            assert entry.measured_loss == pytest.approx(entry.predicted_loss, rel=0.35, abs=1e-4 * entry.total_loss)


@pytest.mark.long
def test_together_loses_no_more_than_either_alone(dense_bytes):
    def plan(**settings):
        return factorized(budget=f"{dense_bytes * 0.2 / 1e3}KB", **settings).twofold_plan

    both = plan(bits="auto", dense_bits=8)
    integers = plan(bits="auto", dense_bits=8, overrides={}, min_rank=10**6)
    assert all(e.rank is None for e in integers.entries) and both.bytes_after <= dense_bytes * 0.2
    assert both.predicted_divergence <= integers.predicted_divergence * 1.0001


@pytest.mark.long
def test_overrides_leave_the_bits_to_the_budget(dense_bytes):
    model = factorized(
        budget=f"{dense_bytes * 0.4 / 1e3}KB",
        bits="auto",
        overrides={"q_proj": {"rank": 5}, "layers.0.mlp.up_proj": {"dense": True}},
    )
    entries = {e.name: e for e in model.twofold_plan.entries}
    queries = [e for name, e in entries.items() if name.endswith("q_proj")]
    assert [e.rank for e in queries] == [5, 5] and all(e.bits in AUTO_BITS for e in queries)
    dense = entries["model.layers.0.mlp.up_proj"]
    assert (dense.rank, dense.bits) == (None, None) and "override" in dense.reason


@pytest.mark.long
def test_a_budget_below_the_smallest_names_the_smallest_and_that_one_works():
    with pytest.raises(
        TwofoldError, match=r"the budget 1KB can't be met: the smallest possible is ([0-9.]+)MB"
    ) as error:
        factorized(budget="1KB", bits="auto")
    smallest = float(str(error.value).partition("possible is ")[2].partition("MB")[0])
    assert factorized(budget=f"{smallest}MB", bits="auto").twofold_plan.bytes_after <= smallest * 1e6


# ------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.long
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        # Each way to store on each kind of layer (GPT-2 has Conv1D), and each architecture by the two ways together.
        *((name, way) for name in ("gpt2", "llama") for way in ({"bits": 8}, {"bits": 4}, {"dense_bits": 4})),
        *((name, {"bits": 3, "dense_bits": 8}) for name in ARCHITECTURES),
    ],
)
def test_what_is_loaded_is_what_was_saved(architecture, settings, tmp_path):
    model = factorized(architecture, keep=0.6 if "bits" in settings else 1.0, **settings)
    integers = [m for m in model.modules() if isinstance(m, IntMatrix)]
    assert integers and not any(isinstance(m, FactoredLinear) and m.bits is None for m in model.modules())
    model.save_pretrained(tmp_path / "a")
    assert stored_bytes(tmp_path / "a") == model.twofold_plan.bytes_after + foreign(model)
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == FORMAT_VERSION
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    again = twofold.load_model(str(tmp_path / "b")).model
    assert torch.equal(logits(again), logits(model))
    dense = again.dequantize()
    assert not any(isinstance(m, IntMatrix | QuantizedEmbedding) for m in dense.modules())
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "c")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "c")), logits(model), rtol=1e-4, atol=1e-4
    )


def foreign(model):
    """The bytes of buffers that an architecture stores of its own."""
    plan, stored = model.twofold_plan, model.state_dict()
    replaced = [e.name for e in plan.entries if e.replaced] + [
        e.name.removesuffix(".weight") for e in plan.dense if e.bits is not None
    ]
    ours = tuple(f"{name}." for name in [*replaced, "lm_head", "embed_out"])
    names = [n for n, _ in model.named_buffers() if n in stored and not n.startswith(ours)]
    return sum(stored[n].numel() * stored[n].element_size() for n in names)


def test_other_heads_dtypes_and_a_second_save(tmp_path):
    model = factorized(keep=0.6, bits=4, dense_bits=8)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    expected = model.model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(base(input_ids=IDS).last_hidden_state, expected)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.isfinite(logits(narrow)).all() and logits(narrow).dtype == torch.bfloat16
    narrow.save_pretrained(tmp_path / "narrow")
    for name, tensor in load_file(tmp_path / "narrow" / "model.safetensors").items():
        if name.endswith((".codes", ".scales")):
            assert torch.equal(tensor, load_file(tmp_path / "model.safetensors")[name])


def test_broken_integers_are_refused(tmp_path):
    factorized(keep=0.6, bits=4, dense_bits=8).save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, said = load_file(path), config.read_text()
    name = next(key for key in whole if key.endswith("up_proj.reduce.codes"))
    scales = name.replace("codes", "scales")

    def refused(match, tensors=None, **settings):
        save_file({**whole, **(tensors or {})}, path, {"format": "pt"})
        told = json.loads(said)
        modules = told["quantization_config"]["modules"]
        for module, changed in settings.items():
            key = next(one for one in modules if one.endswith(module))
            modules[key] = {**modules[key], **changed}
        config.write_text(json.dumps(told))
        for load in (AutoModelForCausalLM.from_pretrained, lambda place: twofold.load_model(str(place))):
            with pytest.raises((TwofoldError, RuntimeError, ValueError), match=match):
                load(tmp_path)

    nan = torch.full_like(whole[scales].view(torch.bfloat16), float("nan")).view(torch.int16)
    refused("scales in the checkpoint hold NaN", {scales: nan})
    refused("(?i)mismatch|codes in the checkpoint|has the shape", {name: whole[name][:, :-1].contiguous()})
    refused("bits must be between 2 and 8", up_proj={"bits": 1})
    refused("bits must be a whole number", up_proj={"bits": "4"})
    refused("a group must have at least one input", up_proj={"group": -1})
    refused("it may have bits, form, group, kind alone, and not 'rank'", embed_tokens={"rank": 3})
    save_file({**whole, name: whole[name].float()}, path, {"format": "pt"})
    config.write_text(said)
    with pytest.raises(TwofoldError, match="is of type F32, the model needs integers"):
        twofold.load_model(str(tmp_path))
    del whole[name]
    refused("lacks|missing")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_is_given_back_as_it_is_reloaded(dtype, tmp_path):
    model = make_model(dtype=dtype)
    made = twofold.factorize(
        model, make_tokenizer(), keep=0.6, bits=4, dense_bits=8, texts=[TEXT], tokens=64, window=32, quiet=True
    )
    assert made.twofold_plan.element_bytes == 2
    made.save_pretrained(tmp_path)
    assert stored_bytes(tmp_path) == made.twofold_plan.bytes_after
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    made.model.rotary_emb.inv_freq = loaded.model.rotary_emb.inv_freq.clone()
    assert torch.equal(logits(loaded), logits(made))


# ------------------------------------------------------------------------------------------------------------- corrections


@pytest.mark.parametrize("shape", SHAPES)
def test_corrections_against_their_definitions_in_float64(shape):
    torch.manual_seed(0)
    m, n = shape
    error = torch.randn(m, n, dtype=torch.float64)
    x = torch.randn(300, n, dtype=torch.float64) * torch.linspace(0.1, 3, n, dtype=torch.float64)
    c, magnitude = x.T @ x / 300, x.abs().mean(0)
    moments = LayerMoments(input=c, input_abs=magnitude)
    rank = 7

    def product(name):
        left, right = OBJECTIVES.get(name).correct(error, moments, 0.0, rank)
        assert left.shape == (m, rank) and right.shape == (rank, n)
        return left @ right

    # lqer: the SVD of E S, taken back.
    u, s, v = torch.linalg.svd(error * magnitude, full_matrices=False)
    torch.testing.assert_close(product("lqer"), (u[:, :rank] * s[:rank]) @ v[:rank] / magnitude)
    # qera-exact: the SVD of E C^½ with the symmetric root, taken back.
    values, vectors = torch.linalg.eigh(c)
    root = (vectors * values.sqrt()) @ vectors.T
    u, s, v = torch.linalg.svd(error @ root, full_matrices=False)
    exact = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)
    torch.testing.assert_close(product("qera-exact"), exact)
    torch.testing.assert_close(product("eora"), exact)
    # No other product of that rank does better on the outputs.
    best = true_loss(error - exact, torch.eye(m, dtype=torch.float64), c)
    assert best == pytest.approx(float((s[rank:] ** 2).sum()))
    svd = weighted_low_rank(error, rank)
    assert best < true_loss(error - svd[0] @ svd[1], torch.eye(m, dtype=torch.float64), c)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lqer", "qera-exact", "eora"])
def test_a_corrected_model_is_nearer_and_loads_to_the_bit(method, architecture, tmp_path):
    original = logits(make_model(architecture))

    def distance(model):
        return float((logits(model) - original).norm() / original.norm())

    model = factorized(architecture, objective=method, bits=3, rank=8)
    layers = [m for m in model.modules() if isinstance(m, CorrectedLinear)]
    assert len(layers) == len(model.twofold_plan.entries) and all(m.rank == 8 for m in layers)
    rounded = factorized(architecture, keep=1.0, dense_bits=3, allocate="uniform", overrides={"*": {"dense": True}})
    assert any(isinstance(m, QuantizedLinear) for m in rounded.modules())
    assert distance(model) < distance(factorized(architecture, objective=method, bits=3, rank=1)) < 1
    model.save_pretrained(tmp_path)
    assert stored_bytes(tmp_path) == model.twofold_plan.bytes_after + foreign(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    torch.testing.assert_close(logits(loaded.dequantize()), logits(model), rtol=1e-4, atol=1e-4)
    # At full rank nothing is left of the error.
    assert distance(factorized(architecture, objective=method, bits=4, rank=10**6)) < 1e-4


# ----------------------------------------------------------------------------------------------------------- the whole command


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"budget": "60KB", "bits": "auto"},
        {"keep": 0.5, "bits": 4, "dense_bits": 8},
        {"keep": 1.0, "dense_bits": 4},
        {"objective": "qera-exact", "bits": 3, "rank": 4},
    ],
)
def test_compress_writes_what_its_plan_says(settings, checkpoint, text_file, tmp_path):
    recipe = make_recipe(
        {"model": str(checkpoint), "calibration": str(text_file), "tokens": 128, "window": 32, "eval_windows": 1}
        | settings
    )
    run = twofold.compress(recipe, tmp_path / "out", quiet=True)
    plan = twofold.Plan.load(tmp_path / "out" / "plan.json")
    assert stored_bytes(tmp_path / "out") == plan.bytes_after == run.bytes_after < run.bytes_before
    assert run.quality.factored["divergence"] >= 0
    assert "Weights stored as integers" in (tmp_path / "out" / "report.html").read_text()
    # The same recipe, read from the folder, gives the same plan.
    again = make_recipe(yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()))
    assert (again.bits, again.dense_bits) == (recipe.bits, recipe.dense_bits)
    loaded = twofold.load_model(str(tmp_path / "out"))
    assert parameter_count(loaded.model) >= 0.4 * parameter_count(make_model())
    weights = inspect(str(tmp_path / "out")).weights
    assert any("bits" in weight.what for weight in weights)
    evaluated = evaluate(
        str(tmp_path / "out"), str(text_file), against=str(checkpoint), window=32, windows=1, quiet=True
    )
    assert evaluated.models[1].disk < evaluated.models[0].disk


def test_a_quality_may_be_asked_for_with_bits():
    model = factorized(kl_at_most=0.4, bits=8, dense_bits=8, eval_windows=2, tokens=96)
    assert any(isinstance(m, QuantizedEmbedding) for m in model.modules())
    assert any("kl-at-most" in note or "searched" in note for note in model.twofold_plan.notes)
    assert all(e.bits == 8 for e in model.twofold_plan.entries)


# --------------------------------------------------------------------------------------------------------------- bad input


def test_a_streamed_model_is_refused(checkpoint, text_file, tmp_path):
    recipe = make_recipe(
        {"model": str(checkpoint), "calibration": str(text_file), "stream": "always", "keep": 0.5, "bits": 4}
    )
    with pytest.raises(TwofoldError, match="`bits=4` works on a model that is whole in memory, and this one is worked"):
        twofold.compress(recipe, tmp_path / "out", quiet=True)


def test_a_plan_without_a_calibration(checkpoint):
    from twofold.run.plan import plan as plan_of

    with pytest.raises(TwofoldError, match="`bits=auto` measures what rounding loses: name `calibration=FILE`"):
        plan_of(make_recipe({"model": str(checkpoint), "budget": "60KB", "bits": "auto"}))
    plan = plan_of(make_recipe({"model": str(checkpoint), "budget": "60KB", "bits": "4"}), estimate=False)
    assert plan.bytes_after <= 60_000 and all(e.bits == 4 for e in plan.entries if e.rank is not None)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"keep": 0.5, "bits": "auto"}, "shares out a budget in bytes"),
        ({"budget": "70%", "bits": "auto"}, "shares out a budget in bytes"),
        ({"keep": 0.5, "bits": 9}, "`bits`: must be auto, or a whole number from 2 to 8, got 9"),
        ({"keep": 0.5, "bits": "four"}, "`bits`: must be auto"),
        ({"keep": 0.5, "dense_bits": 1}, "`dense_bits`: must be none, or a whole number from 2 to 8, got 1"),
        ({"keep": 0.5, "bits": 4, "group_size": 4}, "`group_size`: input should be greater than or equal to 8, got 4"),
        (
            {"keep": 0.5, "bits": 4, "refine": ["distill"]},
            "and `bits=4` rounds them to integers; leave `refine` out",
        ),
        ({"keep": 0.5, "bits": 4, "objective": "modegpt"}, "cuts weights together"),
        ({"budget": "30KB", "bits": "auto", "objective": "asvd"}, "which is not known for `objective=asvd`"),
        ({"budget": "60KB", "bits": "auto", "allocate": "energy"}, "chooses ranks alone"),
        ({"keep": 0.5, "rank": 8}, "`rank` is that of a correction"),
        ({"objective": "eora"}, "give `bits`, as in `bits=4`"),
        ({"objective": "eora", "bits": 4, "keep": 0.5}, "has its size from `bits` and `rank`"),
        ({"objective": "lqer", "bits": 4, "overrides": {"q_proj": {"rank": 3}}}, "gives every weight the same rank"),
        ({"budget": "60KB", "bits": "auto", "overrides": {"q_proj": {"rank": 3000}}}, "above its full rank"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, match):
    with pytest.raises(TwofoldError, match=match):
        factorized(**settings)


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("twofold.quantize.rounding.torchao_version", lambda: None)
    with pytest.raises(
        TwofoldError, match=r"`bits=4` needs torchao, which is not installed: pip install 'twofold\[quantize\]'"
    ):
        factorized(keep=0.5, bits=4)


def test_a_factored_model_of_integers_is_not_rounded_twice(tmp_path):
    factorized(keep=0.6, bits=4).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(TwofoldError, match="holds weights of integers"):
        twofold.factorize(str(tmp_path), keep=0.5, texts=[TEXT], tokens=64, window=32, quiet=True)


@pytest.mark.long
def test_the_command_ends_with_one_sentence_and_exit_code_2(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    import twofold.cli

    quick = [str(checkpoint), "--calibration", str(text_file), "--tokens", "96", "--window", "32", "--quiet"]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["twofold", "compress", *quick, "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as stop:
            twofold.cli.main()
        return stop.value.code, capsys.readouterr().err

    code, error = run("--budget", "2KB", "--bits", "auto")
    assert code == 2 and error.startswith("twofold: the budget 2KB can't be met: the smallest possible is")
    code, error = run("--keep", "0.5", "--bits", "auto")
    assert code == 2 and error.count("\n") == 1 and "--budget 60MB" in error
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(
        sys,
        "argv",
        ["twofold", "compress", *quick, "--out", str(tmp_path / "out"), "--budget", "60KB", "--bits", "auto"],
    )
    try:
        twofold.cli.main()
    except SystemExit as stop:
        assert not stop.code
    assert stored_bytes(tmp_path / "out") <= 60_000
    assert "Size" in capsys.readouterr().out


def test_a_shared_head_with_a_bias_stays_dense():
    shape = {
        "vocab_size": 265,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig(**shape, max_position_embeddings=130, pad_token_id=1)).eval()
    made = twofold.factorize(
        model, tiny.tokenizer(), keep=0.7, bits=8, dense_bits=8, texts=[TEXT], tokens=64, window=32, quiet=True
    )
    kept = {entry.name: entry.bits for entry in made.twofold_plan.dense}
    assert kept["roberta.embeddings.word_embeddings.weight"] is None
    assert made(input_ids=torch.arange(9)[None]).logits.isfinite().all()
