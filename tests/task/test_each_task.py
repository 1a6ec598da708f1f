"""What holds for every task, on a tiny model from its configuration. A new task is one more row."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
import twofold
import twofold.task
from conftest import TEXT, make_model, make_tokenizer
from twofold.calibrate.accumulate import Accumulator
from twofold.calibrate.request import request_statistics
from twofold.model.streamed import Resident
from twofold.model.weights import find_targets
from twofold.recipe import make_recipe
from twofold.task import TASKS, find_task
from twofold.task.output.quality import measure_quality

ROWS = {
    "causal-lm": tiny.Row(make_model, make_tokenizer, {"texts": [TEXT], "tokens": 256, "window": 32}),
    "masked-lm": tiny.Row(tiny.bert_masked, tiny.tokenizer, {"texts": [TEXT], "tokens": 256, "window": 32}),
    "seq2seq": tiny.Row(tiny.bart, tiny.tokenizer, {"samples": tiny.pairs()}),
    "speech": tiny.Row(tiny.whisper, tiny.listener, {"samples": tiny.clips()}),
    "image-classification": tiny.Row(tiny.vit, tiny.viewer, {"samples": tiny.pictures()}),
    "image-text-to-text": tiny.Row(tiny.llava, tiny.reader, {"samples": tiny.described()}),
    "embedding": tiny.Row(tiny.bert, tiny.tokenizer, {"samples": tiny.sentences()}),
    "sequence-classification": tiny.Row(tiny.bert_classes, tiny.tokenizer, {"samples": tiny.sentences()}),
    "token-classification": tiny.Row(tiny.bert_tokens, tiny.tokenizer, {"samples": tiny.sentences()}),
}


def test_a_task_is_one_short_file():
    for name in TASKS.names():
        path = Path(twofold.task.__file__).parent / f"{name.replace('-', '_')}.py"
        assert name == "causal-lm" or len(path.read_text(encoding="utf-8").splitlines()) <= 100


def test_every_task_has_its_row():
    assert sorted(ROWS) == TASKS.names()


@pytest.fixture(params=sorted(ROWS))
def row(request):
    return TASKS.get(request.param), ROWS[request.param]


def test_it_is_found_for_its_models(row):
    task, of = row
    assert find_task(of.model()) is task and find_task(of.model(), task.name) is task


def test_outputs_and_labels_are_one_a_prediction(row):
    task, of = row
    model, samples = of.model(), of.samples(task)
    for batch in samples:
        outputs, labels = task.outputs(model, batch), task.labels(batch)
        assert outputs.dim() == 2 and (labels is None or labels.shape == outputs.shape[:1])
    assert sum(len(task.outputs(model, batch)) for batch in samples) == samples.predictions
    assert task.predicts(model, samples) and task.knows(model, samples)
    example = task.example(model)
    assert all(torch.equal(tensor, task.example(model)[name]) for name, tensor in example.items())
    assert task.outputs(model, example).dim() == 2


@lru_cache
def samples_of(name: str) -> Any:
    return ROWS[name].samples(TASKS.get(name))


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 9), first=st.integers(0, 7))
@pytest.mark.parametrize("name", sorted(ROWS))
def test_batches_are_the_samples_in_their_order(name, size, first):
    samples = samples_of(name)
    samples = samples[min(first, len(samples) - 1) :]
    spans = samples.spans(size)
    assert (
        [last for _, last in spans[:-1]] == [begin for begin, _ in spans[1:]]
        and spans[0][0] == 0
        and spans[-1][1] == len(samples)
    )
    for begin, last in spans:
        batch = samples.batch(begin, last)
        alone = [samples.batch(i, i + 1) for i in range(begin, last)]
        assert all(torch.equal(batch[key], torch.cat([one[key] for one in alone])) for key in batch)
        assert samples.units(begin, last) == sum(samples.units(i, i + 1) for i in range(begin, last))


def test_the_second_moment_of_the_probe_is_the_curvature_of_the_loss(row):
    """E[v vᵀ] of many draws is the Hessian of the loss in the outputs, averaged over what the model itself predicts."""
    task, _ = row
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    losses = {
        "categorical": lambda y: -(outputs.softmax(-1).detach() * y.log_softmax(-1)).sum(),
        "gaussian": lambda y: (y - outputs.detach()).square().sum() / 2,
    }
    exact = torch.autograd.functional.hessian(losses[task.output.name], outputs).reshape(5, 5)
    for curvature in ("sampled", "gauss-newton"):
        many = outputs.expand(40_000, 5).clone()
        drawn = task.output.probe(many, torch.zeros(40_000, dtype=torch.int64), generator, curvature)
        torch.testing.assert_close(drawn.T @ drawn / len(drawn), exact, rtol=0.1, atol=0.01)


def test_gradients_are_those_of_autograd(row):
    """G of every weight is the mean of g gᵀ, g the gradient of v · outputs at the weight's own output."""
    task, of = row
    model, samples = of.model().double(), of.samples(task)
    targets = find_targets(model).targets
    request = request_statistics(targets, {}, {"input", "gradient"}, both_sides=True)
    batch = samples.batch(0, 2)
    model.requires_grad_(False)
    accumulator = Accumulator(Resident(model), targets, request, ("gradient", "input_gradient"), {}, starts=True)
    outputs = task.outputs(model, batch)
    v = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs.backward(v)
    sums = {name: tensor.clone() for name, tensor in accumulator.sums.items()}
    accumulator.remove()
    model.requires_grad_(True)
    kept: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            kept[name] = output

        return hook

    handles = [model.get_submodule(t.name).register_forward_hook(keep(t.name)) for t in targets]
    task.outputs(model, batch).backward(v)
    for handle in handles:
        handle.remove()
    for target in targets:
        g = kept[target.name].grad  # none where the outputs do not look at a weight
        g = torch.zeros_like(kept[target.name]).flatten(0, -2) if g is None else g.flatten(0, -2)
        torch.testing.assert_close(sums[f"gradient/{target.name}"].double(), g.T @ g, rtol=1e-4, atol=1e-8)


def test_a_model_is_no_way_from_itself(row):
    task, of = row
    model, samples = of.model(), of.samples(task)
    predict = lambda i: task.outputs(model, samples.batch(i, i + 1))  # noqa: E731
    _, quality = measure_quality([predict, predict], samples, task, quiet=True)
    assert quality.divergence == pytest.approx(0, abs=1e-9) and quality.agreement == pytest.approx(1, abs=1e-6)


def test_full_rank_gives_the_outputs_back_and_every_weight_is_in_the_plan(row):
    task, of = row
    dense, samples = of.model(), of.samples(task)
    whole = twofold.factorize(
        of.model(), of.processor(), task=task.name, keep=1.0, form="plain", eval_windows=0, quiet=True, **of.given
    )
    for batch in samples:
        torch.testing.assert_close(task.outputs(whole, batch), task.outputs(dense, batch), rtol=1e-3, atol=1e-3)
    plan = whole.twofold_plan
    named = {f"{entry.name}.weight" for entry in plan.entries} | {entry.name for entry in plan.dense}
    named |= {f"{entry.name}.bias" for entry in plan.entries}
    assert {name for name, _ in dense.named_parameters()} <= named


def test_a_smaller_model_is_saved_and_loaded_to_the_bit(row, tmp_path):
    task, of = row
    small = twofold.factorize(
        of.model(), of.processor(), task=task.name, keep=0.6, eval_windows=0, quiet=True, **of.given
    )
    small.save_pretrained(tmp_path / "small")
    again = tiny.aligned(type(small).from_pretrained(tmp_path / "small"))
    for batch in of.samples(task):
        assert torch.equal(task.outputs(again, batch), task.outputs(small, batch))


def test_a_task_that_there_is_not_is_refused():
    recipe = make_recipe({"model": "m", "keep": 0.6, "task": "speech-of-dolphins"})
    with pytest.raises(twofold.TwofoldError, match="there is no task 'speech-of-dolphins'; choose one of causal-lm"):
        find_task(None, recipe.task)
