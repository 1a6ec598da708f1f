"""The two ways to factorize by a plan: in memory, or block by block with the weights on disk."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from twofold.checkpoint.plugin import attach
from twofold.errors import TwofoldError
from twofold.evaluation.streamed import LastStates
from twofold.factor.prepared import Prepared
from twofold.factor.stream import assemble_checkpoint, write_units
from twofold.host import processes
from twofold.host.unfinished import Work
from twofold.model.load import check_ids, load_streamed
from twofold.model.streamed import Streamed
from twofold.model.written import Companions, save_like
from twofold.nn.places import dense_again
from twofold.recipe import Recipe
from twofold.refine import Refined
from twofold.refine.steps.series import refine
from twofold.report.record import Sample
from twofold.task import Samples, Task
from twofold.task.causal_lm import writes_text
from twofold.task.output.quality import Predict
from twofold.task.text.answers import answer
from twofold.task.text.special import prompt_ids

SAMPLE_TOKENS = 32
QUESTION = "What is the capital of France, and why is it famous?"
BEGINNINGS = ("The history of the city begins", "In the morning, the children")


@dataclass
class _Way:
    """A plan that is factorized by, and how."""

    prepared: Prepared
    recipe: Recipe
    work: Work
    companions: Companions  # what goes with the result from the folder of the original
    quiet: bool


@dataclass
class InMemory(_Way):
    """A model in memory, and the dense layers that were replaced in it."""

    replaced: dict[str, nn.Module] = field(default_factory=dict)

    def factorize(self) -> None:
        if processes.is_main():
            self.replaced = self.prepared.factorize(quiet=self.quiet)

    def refine(self) -> list[Refined]:
        folder = self.work.folder / "refine"
        return refine(self.prepared, self.replaced, self.recipe, folder=folder, quiet=self.quiet)

    def predicts(self, samples: Samples, task: Task) -> bool:
        """Say whether the model gives outputs of the task."""
        return task.predicts(self.prepared.loaded.model, samples)

    def models(self, samples: Samples, task: Task) -> list[Predict]:
        """Return the original and the factored model as functions from the number of a sample to outputs."""
        model = self.prepared.loaded.model

        def factored(i: int) -> Tensor:
            return task.outputs(model, samples.batch(i, i + 1))

        return [dense_again(model, self.replaced)(factored), factored]

    @torch.no_grad()
    def scores(self, samples: Samples, task: Task) -> tuple[dict[str, float], dict[str, float]]:
        """Return the task's own measures of the original and of the factored model."""
        loaded = self.prepared.loaded
        with dense_again(loaded.model, self.replaced):
            before = task.score(loaded, samples)
        return before, task.score(loaded, samples)

    def answers(self) -> list[Sample]:
        """Return what both models answer greedily to two prompts, for a reader of the report; nothing without a tokenizer."""
        model, tokenizer = self.prepared.loaded.model, self.prepared.loaded.tokenizer
        if tokenizer is None or not writes_text(model):
            return []
        prompts = [(text, text, False) for text in BEGINNINGS]
        if getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": QUESTION}]
            with suppress(Exception):  # a template is data, and may refuse anything
                text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
                prompts[0] = (QUESTION, text, True)
        samples = []
        for prompt, text, rendered in prompts:
            try:
                ids = prompt_ids(tokenizer, text, rendered=rendered)
                check_ids(torch.tensor(ids), self.prepared.loaded)
            except TwofoldError as error:
                self.prepared.plan.notes.append(f"no sample answer to {prompt!r}: {error}")
                continue
            with dense_again(model, self.replaced):
                before = answer(model, tokenizer, ids, SAMPLE_TOKENS)
            after = answer(model, tokenizer, ids, SAMPLE_TOKENS)
            samples.append(Sample(prompt=prompt, original=before, factored=after))
        return samples

    def write(self, folder: Path) -> None:
        self.replaced.clear()
        model = self.prepared.loaded.model
        attach(model)
        save_like(self.prepared.loaded, model, folder)
        self.companions.write(folder)


@dataclass
class OnDisk(_Way):
    """A model whose weights are on disk, and the parts of the factored checkpoint that are written block by block."""

    @property
    def residence(self) -> Streamed:
        residence = self.prepared.loaded.residence
        assert isinstance(residence, Streamed)
        return residence

    def factorize(self) -> None:
        self.work.update(units=write_units(self.work.folder / "checkpoint", self.prepared, quiet=self.quiet))

    def refine(self) -> list[Refined]:
        return []  # refused before any work

    def predicts(self, samples: Samples, task: Task) -> bool:
        return self.residence.has_head and task.knows(self.prepared.loaded.model, samples)

    def models(self, samples: Samples, task: Task) -> list[Predict]:
        """Return the original and the factored model; each is worked through once, and its last hidden states are kept."""
        folder = self.work.folder / "factored"
        folder.mkdir(exist_ok=True)
        self.write(folder)
        settings = self.recipe.model_copy(update={"model": str(folder), "revision": None})
        factored = load_streamed(settings, self.residence.chain).residence
        assert isinstance(factored, Streamed)
        return [LastStates(model, samples, task, quiet=self.quiet).outputs for model in (self.residence, factored)]

    def scores(self, samples: Samples, task: Task) -> tuple[dict[str, float], dict[str, float]]:
        return {}, {}  # a task that can go block by block has none

    def answers(self) -> list[Sample]:
        self.prepared.plan.notes.append(
            "no sample answers: the model was worked through block by block, and writing text that way takes too long"
        )
        return []

    def write(self, folder: Path) -> None:
        assemble_checkpoint(folder, self.work.folder / "checkpoint", self.residence, self.prepared.loaded.stored_dtype)
        self.companions.write(folder)
