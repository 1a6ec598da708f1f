"""What is measured of models of any task: with labels and without, of classes and of features."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from twofold.evaluation.reference import DenseReference
from twofold.task import TASKS, Task
from twofold.task.data.examples import Example, Examples
from twofold.task.output.gaussian import GAUSSIAN
from twofold.task.output.quality import measure_quality

CLASSES: Any = TASKS.get("image-classification")


class Features(Task):
    name, output, read = "features", GAUSSIAN, None  # type: ignore[assignment]
    data = measured = example = None  # type: ignore[assignment]


def samples(labels: list[Any]) -> Examples:
    """One prediction each; None is no label."""
    batches = [{"x": torch.zeros(1, 2), **({} if y is None else {"labels": torch.tensor([[y]])})} for y in labels]
    return Examples(tuple(map(Example, batches)), "drawn", "images")


@pytest.fixture
def two() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(4, 1, 3, generator=generator) for _ in range(2)]
    return [lambda i, table=table: table[i] for table in tables]


def test_a_loss_is_the_mean_over_the_labels_and_a_divergence_over_all(two):
    given = samples([2, None, 0, None])
    first, second = measure_quality(two, given, CLASSES, quiet=True)
    logs = [torch.cat([model(i) for i in range(4)]).log_softmax(-1) for model in two]
    assert first.loss == pytest.approx(-float(logs[0][0, 2] + logs[0][2, 0]) / 2, rel=1e-5)
    assert (first.tokens, second.tokens) == (4, 4) and first.perplexity is None and first.divergence is None
    assert second.divergence == pytest.approx(float((logs[0].exp() * (logs[0] - logs[1])).sum()) / 4, rel=1e-5)
    assert second.agreement == float((logs[0].argmax(-1) == logs[1].argmax(-1)).float().mean())
    assert measure_quality(two, samples([None] * 4), CLASSES, quiet=True)[1].loss is None


def test_a_perplexity_is_told_of_tasks_that_go_by_it(two, monkeypatch):
    monkeypatch.setattr(type(CLASSES), "perplexity", True)
    (quality,) = measure_quality(two[:1], samples([2, 1, 0, 0]), CLASSES, quiet=True)
    assert quality.perplexity == pytest.approx(math.exp(quality.loss))


@pytest.mark.parametrize("task", [CLASSES, Features], ids=["classes", "features"])
def test_a_reference_gives_the_same_numbers(two, task, tmp_path):
    task = task if isinstance(task, Task) else task.__new__(task)
    given = samples([1, None, 0, 2] if task is CLASSES else [None] * 4)
    together = measure_quality(two, given, task, quiet=True)
    for _ in range(2):  # the second one finds what the first has kept
        reference = DenseReference(two[0], given, task, tmp_path, "a", quiet=True)
        assert [reference.quality, reference.measure(two[1], two[0], quiet=True)] == together
