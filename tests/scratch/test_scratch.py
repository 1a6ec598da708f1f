"""Factorized models that are trained from scratch: their start, their optimizer, and that they are saved and train."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import twofold
from conftest import CONFIGS, TEXT, make_model, make_tokenizer
from twofold.model.kinds import dense_weight
from twofold.model.weights import find_targets
from twofold.nn.layers.factored import FactoredLinear
from twofold.scratch.optimizer import ProductDecay
from twofold.scratch.start import STARTS, factorize_start
from twofold.scratch.steps import DIRECTION, matrix_norm

BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def factored(model: nn.Module) -> dict[str, FactoredLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


def tokens() -> torch.Tensor:  # (windows, 32)
    ids = torch.tensor(make_tokenizer()(TEXT)["input_ids"])
    return ids[: len(ids) // 32 * 32].view(-1, 32)


@BOTH
def test_the_spectral_start_is_the_truncated_svd_of_the_dense_start(architecture: str) -> None:
    dense = make_model(architecture)
    weights = {t.name: dense_weight(dense.get_submodule(t.name)).detach().double() for t in find_targets(dense).targets}
    model = twofold.factorize(make_model(architecture), init="spectral", keep=0.5)
    layers = factored(model)
    assert layers.keys() == weights.keys()
    for name, layer in layers.items():
        u, s, vh = torch.linalg.svd(weights[name], full_matrices=False)
        r = layer.rank
        nearest = (u[:, :r] * s[:r]) @ vh[:r]
        torch.testing.assert_close(layer.to_dense(torch.float64), nearest, atol=1e-6, rtol=1e-5)
        for gram in (layer.expand.weight.T @ layer.expand.weight, layer.reduce.weight @ layer.reduce.weight.T):
            torch.testing.assert_close(gram.double(), s[:r].diag(), atol=1e-5, rtol=1e-4)
        assert layer.form == "plain" and layer.reduce.weight.requires_grad and layer.expand.weight.requires_grad


@pytest.mark.parametrize("shape", [(256, 128), (96, 320)])
def test_a_random_start_is_as_large_as_the_dense_one(shape: tuple[int, int]) -> None:
    weight = 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = STARTS["random"](weight, 40, torch.Generator().manual_seed(1))
    assert left.shape == (shape[0], 40) and right.shape == (40, shape[1])
    assert float((left @ right).square().mean()) == pytest.approx(float(weight.square().mean()), rel=0.05)
    assert float(left.std()) == pytest.approx(float(right.std()), rel=0.05)


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8])
def test_it_stores_the_share_that_was_asked_for(architecture: str, keep: float) -> None:
    model = twofold.factorize(CONFIGS[architecture](), keep=keep)
    for name, layer in factored(model).items():
        m, n = layer.out_features, layer.in_features
        assert layer.rank == math.floor(keep * m * n / (m + n)), name
    plan = model.twofold_plan
    dense = sum(p.numel() for p in AutoModelForCausalLM.from_config(CONFIGS[architecture]()).parameters())
    numbers = sum(entry.numbers_after - entry.numbers_before for entry in plan.entries)
    assert sum(p.numel() for p in model.parameters()) == dense + numbers
    assert plan.keep <= keep
    assert {entry.name: entry.reason for entry in plan.dense}  # what stays dense says why
    assert all(entry.reason for entry in plan.dense)


@BOTH
@pytest.mark.parametrize("init", ["spectral", "random"])
def test_it_is_saved_and_loaded(architecture: str, init: str, tmp_path: Path) -> None:
    model = twofold.factorize(CONFIGS[architecture](), init=init, keep=0.5, seed=3).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens()[:2]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    twofold.training_optimizer(loaded)  # and training may go on


@pytest.mark.long
@BOTH
def test_the_trainer_trains_it(architecture: str, tmp_path: Path) -> None:
    model = twofold.factorize(CONFIGS[architecture](), keep=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = twofold.training_optimizer(model, lr=5e-3, weight_decay=0.1)
    settings = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=25, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_steps=1, logging_strategy="steps",
    )  # fmt: skip
    rows = [{"input_ids": one, "labels": one} for one in tokens()]
    trainer = Trainer(model=model, args=settings, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    assert losses[0] > 5 and losses[-1] < losses[0] - 1.5
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_same_seed_gives_the_same_weights_and_leaves_the_rest_alone() -> None:
    config = CONFIGS["llama"]()
    state = torch.random.get_rng_state()
    first, same, other = (twofold.factorize(config, keep=0.5, init="random", seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(
        first["model.layers.0.mlp.up_proj.reduce.weight"], other["model.layers.0.mlp.up_proj.reduce.weight"]
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert getattr(config, "quantization_config", None) is None  # the caller's configuration is as it was


def test_the_class_that_the_configuration_names_is_built() -> None:
    config = CONFIGS["llama"]()
    config.architectures = ["LlamaForSequenceClassification"]
    assert type(twofold.factorize(config, keep=0.5)).__name__ == "LlamaForSequenceClassification"


def test_patterns_and_overrides() -> None:
    model = twofold.factorize(
        CONFIGS["llama"](), keep=0.5, exclude=["down_proj"], overrides={"up_proj": {"rank": 3}}, rank_multiple=2
    )
    layers = factored(model)
    assert not any(name.endswith("down_proj") for name in layers)
    assert "excluded" in {entry.reason for entry in model.twofold_plan.dense}
    assert {layer.rank for name, layer in layers.items() if name.endswith("up_proj")} == {2}
    assert all(layer.rank % 2 == 0 for layer in layers.values()) and 0.4 < model.twofold_plan.keep <= 0.5


def test_a_half_precision_model_keeps_its_dtype() -> None:
    model = twofold.factorize(make_model(dtype=torch.bfloat16), init="spectral", keep=0.5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0}, "greater than 0"),
        ({"keep": 1.5}, "less than or equal to 1"),
        ({"keep": 1.0}, "every weight stays dense"),
        ({"keep": 0.001}, "smallest"),
        ({"init": "orthogonal"}, "init must be one of spectral, random"),
        ({"budget": "1M"}, "budget does not go with init"),
        ({"calibration": "texts.txt"}, "not calibrated"),
        ({"include": ["no_such_layer"]}, "matches no linear layer"),
        ({"exclude": ["*"]}, "nothing to factorize"),
    ],
)
def test_settings_that_do_not_go(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(twofold.TwofoldError, match=words):
        twofold.factorize(CONFIGS["llama"](), **settings)


@pytest.mark.long
def test_starts_that_do_not_go() -> None:
    done = twofold.factorize(CONFIGS["llama"](), keep=0.5)
    quantized = CONFIGS["llama"]()
    quantized.quantization_config = {"quant_method": "awq"}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    integers = twofold.factorize(
        make_model(), make_tokenizer(), keep=0.7, texts=[TEXT], tokens=64, window=32, bits="4", quiet=True
    )
    for start, words in (
        (done, "factorized already"),
        (done.config, "no start for a training"),
        (quantized, "no start for a training"),
        ("smollm2", "takes a transformers configuration or a loaded model"),
        (nn.Linear(8, 8), "takes a transformers model or its name"),
        (empty, "no numbers in memory"),
        (integers, "integers are not factorized"),
        (AutoConfig.for_model("vit"), "no model can be built"),
    ):
        with pytest.raises(twofold.TwofoldError, match=words):
            factorize_start(start)


def one_layer() -> Any:
    torch.manual_seed(0)
    model = twofold.factorize(CONFIGS["llama"](), keep=0.5)
    return model, model.get_submodule("model.layers.0.mlp.up_proj")


def exact_norm(weight: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def test_a_step_of_a_factor_is_scaled_by_the_norm_of_the_other() -> None:
    model, layer = one_layer()
    with torch.no_grad():  # far from balanced
        layer.expand.weight.mul_(20)
        layer.reduce.weight.div_(20)
    a, b = layer.expand.weight, layer.reduce.weight
    before = {"a": a.detach().clone(), "b": b.detach().clone()}
    m, n, r, lr = layer.out_features, layer.in_features, layer.rank, 1e-3
    optimizer = twofold.training_optimizer(model, lr=lr, scale="product")
    ids = tokens()[:2]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, weight, scale in (
        ("b", b, 0.5 * math.sqrt(m / r) / exact_norm(before["a"])),
        ("a", a, 0.5 * math.sqrt(n / r) / exact_norm(before["b"])),
    ):
        gradient = weight.grad
        expected = -lr * scale * gradient / (gradient.abs() + 1e-8)  # the first step of Adam
        torch.testing.assert_close(weight.detach() - before[name], expected, rtol=0.05, atol=1e-7)
    change_b, change_a = b.detach() - before["b"], a.detach() - before["a"]
    most = lr * math.sqrt(m * n)  # of a step of a dense weight
    assert 0 < exact_norm(before["a"] @ change_b + change_a @ before["b"]) <= 1.05 * most
    assert {group["lr"] for group in optimizer.param_groups} == {lr}


@pytest.mark.parametrize("shape", [(96, 16), (16, 96)])
def test_the_norm_is_followed(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    norm, direction = matrix_norm(weight, None)
    assert (
        0.95 * exact_norm(weight) <= norm <= 1.0001 * exact_norm(weight)
    )  # iterated norms are never above the exact ones
    for _ in range(50):
        weight += 0.01 * torch.randn(shape, generator=generator)
        norm, direction = matrix_norm(weight, direction)
    assert norm == pytest.approx(exact_norm(weight), rel=0.02)
    assert matrix_norm(torch.zeros(shape), None)[0] == 0.0


def test_the_decay_is_the_gradient_of_the_products_norm() -> None:
    model, layer = one_layer()
    a, b = layer.expand.weight, layer.reduce.weight
    penalty = 0.5 * (a @ b).square().sum()
    to_a, to_b = torch.autograd.grad(penalty, (a, b))
    before = a.detach().clone(), b.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    ProductDecay([layer], 0.5).attach(optimizer)
    optimizer.step()  # no gradients, so nothing but the decay
    torch.testing.assert_close(a.detach(), before[0] - 0.005 * to_a, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(b.detach(), before[1] - 0.005 * to_b, rtol=1e-5, atol=1e-7)


def test_no_step_changes_a_product_or_a_dense_weight_by_more_than_the_bound() -> None:
    model = twofold.factorize(CONFIGS["llama"](), keep=0.5, exclude=["q_proj"])
    optimizer = twofold.training_optimizer(model, lr=0.5, embedding_lr=1e-3, bound=0.02)  # far too fast
    ids = tokens()[:2]

    def weights() -> dict[str, torch.Tensor]:
        names = [name for name, m in model.named_modules() if isinstance(m, FactoredLinear) or name.endswith("q_proj")]
        return {name: dense_weight(model.get_submodule(name)).detach().double() for name in names}

    for _ in range(4):
        before = weights()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        for name, weight in weights().items():
            change = exact_norm(weight - before[name]) / exact_norm(before[name])
            assert 0 < change <= 0.025, name  # the norms are right to some percent


@pytest.mark.parametrize("scale", ["bound", "product"])
def test_rates_follow_a_scheduler_and_the_state_is_loaded_again(scale: Any) -> None:
    ids = tokens()[:4]

    def steps(model: Any, optimizer: Any, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    model = twofold.factorize(CONFIGS["llama"](), keep=0.5)
    optimizer = twofold.training_optimizer(model, lr=4e-3, weight_decay=0.1, scale=scale)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    steps(model, optimizer, 1)
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3}
    assert f"{DIRECTION}weight" in optimizer.state[model.get_submodule("model.layers.0.mlp.up_proj").reduce.weight]

    other = twofold.factorize(CONFIGS["llama"](), keep=0.5)
    other.load_state_dict(model.state_dict())
    again = twofold.training_optimizer(other, lr=4e-3, weight_decay=0.1, scale=scale)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 2)
    steps(other, again, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("scale", ["product", "bound", "none"])
@pytest.mark.parametrize("decay", ["product", "factors"])
def test_every_parameter_is_in_one_group(scale: Any, decay: Any) -> None:
    model = twofold.factorize(CONFIGS["gpt2"](), keep=0.5)
    optimizer = twofold.training_optimizer(
        model, lr=1e-3, embedding_lr=4e-3, scale=scale, decay=decay, weight_decay=0.1
    )
    rates = {
        name: g["lr"]
        for g in optimizer.param_groups
        for name, p in model.named_parameters()
        for q in g["params"]
        if p is q
    }
    assert {name for name, rate in rates.items() if rate == 4e-3} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups if group["params"][0].dim() < 2)
    factors = {id(w) for layer in factored(model).values() for w in (layer.reduce.weight, layer.expand.weight)}
    decays = {g["weight_decay"] for g in optimizer.param_groups for p in g["params"] if id(p) in factors}
    assert decays == {0.0 if decay == "product" else 0.1}


def test_optimizers_that_can_not_be_made() -> None:
    model = twofold.factorize(CONFIGS["llama"](), keep=0.5)
    for settings, words in (
        ({"scale": "spectron"}, "scale must be one of"),
        ({"decay": "no"}, "decay must be one of"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"embedding_lr": -1.0}, "embedding_lr must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"bound": 0.0}, "bound must be above 0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
    ):
        with pytest.raises(twofold.TwofoldError, match=words):
            twofold.training_optimizer(model, **settings)  # type: ignore[arg-type]
    gauge = twofold.factorize(make_model(), make_tokenizer(), keep=0.7, texts=[TEXT], tokens=64, window=32, quiet=True)
    with pytest.raises(twofold.TwofoldError, match="takes plain ones"):
        twofold.training_optimizer(gauge)
    assert twofold.training_optimizer(gauge, scale="none").param_groups  # AdamW as it is
    with pytest.raises(twofold.TwofoldError, match="no parameter that is trained"):
        twofold.training_optimizer(model.requires_grad_(False))


@pytest.mark.parametrize("scale", ["bound", "product"])
def test_weights_that_a_step_leaves_out_stay_as_they_are(scale: Any) -> None:
    torch.manual_seed(0)
    model = twofold.factorize(CONFIGS["llama"](), keep=0.5)
    optimizer = twofold.training_optimizer(model, lr=0.5, scale=scale)
    block, ids = model.model.layers[0], tokens()[:2]
    for frozen in (False, True):
        block.requires_grad_(not frozen)
        before = [parameter.detach().clone() for parameter in block.parameters()]
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, block.parameters(), strict=True)) == frozen


def test_a_factor_without_gradient_is_no_error() -> None:
    model = twofold.factorize(CONFIGS["llama"](), keep=0.5)
    optimizer = twofold.training_optimizer(model, lr=0.5)
    layer = next(iter(factored(model).values()))
    layer.expand.weight.requires_grad_(False)
    before, ids = layer.expand.weight.clone(), tokens()[:2]
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert torch.equal(layer.expand.weight, before)
