"""The two ways to carry a plan out: on a model in memory, or block by block with the weights on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from twofold.checkpoint.plugin import attach
from twofold.evaluation.streamed import LastStates
from twofold.factor.apply import factor_entries
from twofold.factor.prepared import Prepared, carry_out
from twofold.factor.stream import finish, write_units
from twofold.host import processes
from twofold.host.progress import progress
from twofold.host.quiet import quiet_bars
from twofold.host.unfinished import Work
from twofold.model.load import load_streamed
from twofold.model.streamed import Streamed
from twofold.nn.compact import CompactLinear
from twofold.nn.places import cast_weights, dense_again
from twofold.planning.plan import PlanEntry
from twofold.recipe import Recipe
from twofold.refine import Refined
from twofold.refine.steps.series import refine
from twofold.report.record import Sample
from twofold.run.answers import sample_answers
from twofold.task import Samples, Task
from twofold.task.output.quality import Predict


class InMemory:
    """A model that is in memory, and the dense layers that were replaced in it."""

    def __init__(self, prepared: Prepared, recipe: Recipe) -> None:
        self.prepared, self.recipe = prepared, recipe
        self.replaced: dict[str, nn.Module] = {}

    def factorize(self, *, quiet: bool) -> None:
        if processes.is_main():
            self.replaced = carry_out(self.prepared, quiet=quiet)

    def refine(self, folder: Path, *, quiet: bool) -> list[Refined]:
        return refine(self.prepared, self.replaced, self.recipe, folder=folder, quiet=quiet)

    def models(self, samples: Samples, task: Task, *, quiet: bool) -> list[Predict]:
        """Return the original and the factored model as functions from the number of a sample to outputs."""
        model = self.prepared.loaded.model

        def factored(i: int) -> Tensor:
            return task.outputs(model, samples.batch(i, i + 1))

        def dense(i: int) -> Tensor:
            with dense_again(model, self.replaced):
                return factored(i)

        return [dense, factored]

    def predicts(self, samples: Samples, task: Task) -> bool:
        """Say whether the model gives outputs of the task."""
        return task.predicts(self.prepared.loaded.model, samples)

    def answers(self) -> list[Sample]:
        return sample_answers(self.prepared.loaded, self.replaced)

    def write(self, folder: Path) -> None:
        self.replaced.clear()
        model = self.prepared.loaded.model
        cast_weights(model, self.prepared.loaded.stored_dtype)
        attach(model)
        with quiet_bars():
            model.save_pretrained(folder)


class OnDisk:
    """A model whose weights are on disk, and the parts of the factored checkpoint that are written block by block."""

    def __init__(self, prepared: Prepared, recipe: Recipe, work: Work) -> None:
        self.prepared, self.recipe, self.work = prepared, recipe, work
        assert isinstance(prepared.loaded.residence, Streamed)
        self.residence: Streamed = prepared.loaded.residence

    def factorize(self, *, quiet: bool) -> None:
        prepared, loaded = self.prepared, self.prepared.loaded
        with progress("Factorizing", len(prepared.plan.entries), unit="weights", quiet=quiet) as tick:

            def factor(entries: list[PlanEntry]) -> Iterator[tuple[PlanEntry, CompactLinear | None, str | None]]:
                return factor_entries(loaded.model, entries, prepared.made, loaded.stored_dtype, tick)

            prepared.plan, units = write_units(self.work.checkpoint, self.residence, prepared.plan, factor, tick)
        self.work.update(units=units)

    def refine(self, folder: Path, *, quiet: bool) -> list[Refined]:
        return []  # refused before any work

    def predicts(self, samples: Samples, task: Task) -> bool:
        return self.residence.has_head and task.knows(self.prepared.loaded.model, samples)

    def models(self, samples: Samples, task: Task, *, quiet: bool) -> list[Predict]:
        """Return the original and the factored model; each is worked through once, and its last hidden states are kept."""
        folder = self.work.folder / "factored"
        folder.mkdir(exist_ok=True)
        finish(folder, self.work.checkpoint, self.residence, self.prepared.loaded.stored_dtype)
        smaller = load_streamed(
            str(folder),
            self.residence.chain,
            dtype=self.recipe.dtype,
            device=self.recipe.device,
            trust_remote_code=self.recipe.trust_remote_code,
        ).residence
        assert isinstance(smaller, Streamed)
        return [LastStates(one, samples, task, quiet=quiet).outputs for one in (self.residence, smaller)]

    def answers(self) -> list[Sample]:
        self.prepared.plan.notes.append(
            "no sample answers: the model was worked through block by block, and writing text that way takes too long"
        )
        return []

    def write(self, folder: Path) -> None:
        finish(folder, self.work.checkpoint, self.residence, self.prepared.loaded.stored_dtype)
