"""Refinements of models that are for something else than the next token: samples of several sizes, features, no labels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import twofold.extend as tf
from conftest import TEXT, make_model, make_tokenizer
from twofold import TwofoldError
from twofold.calibrate.opened import Opened
from twofold.model.load import LoadedModel
from twofold.objectives import OBJECTIVES
from twofold.recipe import make_recipe
from twofold.refine import REFINEMENTS
from twofold.refine.steps.job import Job
from twofold.refine.steps.likeness import Likeness
from twofold.run.check import refuse
from twofold.run.factorize import factorize
from twofold.run.open import _missing_of
from twofold.task.output.gaussian import GAUSSIAN


class Sentences(tf.Samples):
    """Rows of token ids, of any lengths."""

    unit, source = "sentences", "drawn sentences"

    def __init__(self, rows: list[Tensor], each: bool) -> None:
        self.rows, self.one = rows, each

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, first: int, last: int) -> Any:
        return {"input_ids": torch.stack(self.rows[first:last])}

    def take(self, places: Sequence[int]) -> Sentences:
        return Sentences([self.rows[i] for i in places], self.one)

    def __add__(self, others: Sentences) -> Sentences:
        return Sentences(self.rows + others.rows, self.one)

    def units(self, first: int, last: int) -> int:
        return last - first

    def spans(self, size: int) -> list[tuple[int, int]]:
        return [(i, i + 1) for i in range(len(self))]

    @property
    def predictions(self) -> int:
        return len(self) if self.one else sum(map(len, self.rows))

    @property
    def shape(self) -> list[int]:
        return [len(self)]

    @property
    def sha256(self) -> str:
        return ""


class _Other(tf.Task):
    settings = tf.Settings

    def fits(self, model: Any) -> bool:
        return False

    def data(self, *args: Any, **how: Any) -> Any:
        raise AssertionError

    def measured(self, loaded: Any, settings: Any) -> None:
        return None

    def example(self, model: Any) -> Any:
        return {"input_ids": torch.arange(6)[None]}

    def labels(self, batch: Any) -> None:
        return None


class Pooled(_Other):
    """One prediction a sentence: the mean of its logits, as features."""

    name, output = "pooled", GAUSSIAN

    def read(self, result: Any, batch: Any, model: Any) -> Tensor:
        return result.logits.mean(1)  # type: ignore[no-any-return]


class Tagged(_Other):
    """A prediction for every token."""

    name, output = "tagged", tf.CATEGORICAL

    def read(self, result: Any, batch: Any, model: Any) -> Tensor:
        return result.logits[..., :40].flatten(0, 1)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def factored():
    return factorize(
        make_model(),
        make_tokenizer(),
        texts=[TEXT],
        keep=0.5,
        form="plain",
        tokens=320,
        window=32,
        eval_windows=0,
        quiet=True,
    )


@pytest.fixture(params=[Pooled, Tagged], ids=lambda task: task.name)
def job(request, factored):
    dense, small = make_model(), copy.deepcopy(factored)
    replaced = {e.name: dense.get_submodule(e.name) for e in small.twofold_plan.entries if e.rank is not None}
    generator, task = torch.Generator().manual_seed(0), request.param()
    rows = [torch.randint(0, 256, (length,), generator=generator) for length in (5, 24, 9, 9, 17, 40, 3, 12)]
    samples = Sentences(rows, each=task.output is GAUSSIAN)
    recipe = make_recipe({"model": "x", "keep": 0.5, "refine_rate": 1e-2, "refine_passes": 2, "refine_batch": 3})
    loaded = LoadedModel(small, None, "x", None, torch.float32)
    objective = OBJECTIVES.get("two-sided")
    return Job(loaded, replaced, small.twofold_plan, None, objective, samples, samples[:3], task, recipe, quiet=True)


def test_every_prediction_counts_once(job):
    """The loss of several samples is the mean over their predictions, however they are taken together."""
    loss = Likeness(job)
    assert loss.together == 1024 // 40
    both = [job.dense_outputs, job.outputs]
    with torch.no_grad():
        dense, own = (torch.cat([outputs(batch) for batch in job.samples]) for outputs in both)
        assert len(own) == job.samples.predictions
        apart, _ = job.task.output.divergence(*(job.task.output.score(y, None)[1] for y in (dense, own)))
        assert float(loss(range(len(job.samples)))) == pytest.approx(apart / len(own), rel=1e-4)
        assert loss.held_out() == pytest.approx(job.divergence(), rel=1e-4)
        loss.together = 2
        assert loss.held_out() == pytest.approx(job.divergence(), rel=1e-4)


@pytest.mark.parametrize("name", ["distill", "natural-gradient"])
def test_it_is_refined_by_the_divergence_of_its_task(job, name):
    before = job.divergence()
    refined = REFINEMENTS.get(name).run(job)
    assert refined.loss_before == pytest.approx(before, rel=1e-4)
    assert job.divergence() == pytest.approx(refined.loss_after, rel=1e-4) and refined.loss_after < 0.95 * before
    assert refined.tokens == (15 if name == "distill" else 8)  # 5 steps of 3, or all of them once
    assert f"over {refined.tokens} sentences" in refined.words and "held-out calibration sentences" in refined.words


def test_labels_that_there_are_not_are_refused(job):
    job.recipe.__dict__["refine_labels"] = 0.5
    with pytest.raises(TwofoldError, match=r"`refine_labels=0\.5` looks at what is right for each prediction"):
        Likeness(job)


@pytest.mark.parametrize("name", ["blockwise", "anchored"])
def test_what_goes_from_block_to_block_is_refused(job, name, monkeypatch):
    recipe = make_recipe({"model": "x", "keep": 0.5, "refine": name})
    monkeypatch.setattr(Opened, "task", job.task)
    missing = _missing_of(Opened(job.loaded), recipe)
    with pytest.raises(
        TwofoldError,
        match=f"`refine={name}` goes from block to block, which is not done for the task {job.task.name}; use `refine=distill`",
    ):
        refuse(recipe, missing)
