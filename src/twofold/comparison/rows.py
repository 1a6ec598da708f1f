"""The rows of a comparison: the dense model, quantizations of it, and every cell, each taken from the folder or measured."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from twofold.allocate import ALLOCATIONS
from twofold.comparison.cells import Cells
from twofold.comparison.grid import Cell
from twofold.comparison.quantized import quantized
from twofold.comparison.record import Row
from twofold.comparison.shared import Decomposed, Shared
from twofold.errors import TwofoldError
from twofold.evaluation.reference import Reference
from twofold.evidence.base import Measurement
from twofold.factor.prepared import Prepared, carry_out
from twofold.factor.recalibrate import recalibrate
from twofold.host.clock import Stopwatch
from twofold.host.progress import say
from twofold.nn.places import dense_again, put_back
from twofold.objectives import OBJECTIVES
from twofold.planning.evidence import Evidence, gather
from twofold.planning.make import make_plan
from twofold.quantize.rounding import torchao_version
from twofold.recipe import Recipe
from twofold.refine.steps.series import refine
from twofold.task import Samples
from twofold.task.output.quality import Predict, measure_quality


class Rows:
    """The rows, each taken from the folder or else measured."""

    def __init__(self, shared: Shared, out: Path, impossible: Mapping[Cell, str], baselines: list[str]) -> None:
        self.shared, self.out, self.impossible, self.baselines = shared, out, impossible, baselines
        self.cells = Cells(out, shared.belongs())
        self._reference: Reference | None = None
        self._evidence: dict[tuple[str, str], Evidence] = {}  # of an objective and an allocation, for all keep ratios
        self.total = 1 + len(baselines) + sum(1 for _ in shared.grid.cells())
        self.dense: Row | None = None

    def all(self) -> Iterator[Row]:
        """The dense model first, then the baselines, then the cells of the grid in its order."""
        self.dense = self._dense()
        yield self.dense
        number = 1
        for name in self.baselines:
            number += 1
            yield self._baseline(name, number)
        for objective, together in groupby(self.shared.grid.cells(), key=lambda cell: cell.objective):
            group = list(together)
            found = {cell: self.cells.load(cell.name) for cell in group}
            missing = [cell for cell in group if found[cell] is None and cell not in self.impossible]
            of, reason = None, ""
            try:
                of = self.shared.decomposed(OBJECTIVES.get(objective)) if missing else None
            except TwofoldError as error:  # this objective does not go with the model; the others may
                reason = str(error)
                self._say(number + 1, f"{objective} skipped: {reason}")
            for cell in group:
                number += 1
                row = found[cell]
                if cell in self.impossible:
                    row = skipped_row(cell, self.impossible[cell])
                elif row is None:
                    row = self.cell(cell, of, number) if of is not None else skipped_row(cell, reason)
                yield row
            of = None  # its bases go before the next ones come
            self._evidence.clear()

    def _say(self, number: int, words: str) -> None:
        if not self.shared.quiet:
            say(f"row {number} of {self.total}: {words}")

    def _dense(self) -> Row:
        row = self.cells.load("dense")
        if row is None:
            self._say(1, "dense")
            watch = Stopwatch()
            with watch.stage("measure"):
                perplexity, _ = self._measure(None)
            if not all(map(math.isfinite, perplexity)):
                raise TwofoldError(f"the perplexity of {self.shared.loaded.name} itself is not a number on these texts")
            numbers = self.shared.targets.total_numbers
            row = Row(
                name="dense",
                kind="dense",
                keep=1.0,
                keep_model=1.0,
                parameters=numbers,
                bytes=numbers * self.shared.element_bytes,
                bytes_16=numbers * 2,
                perplexity=perplexity,
                ratio=[1.0] * len(perplexity),
                seconds=watch.seconds,
            )
            self.cells.save("dense", row)
        return row

    def _baseline(self, name: str, number: int) -> Row:
        """A quantization of the dense model."""
        extra = str(torchao_version())
        row = self.cells.load(name, extra)
        if row is not None:
            return row
        self._say(number, name)
        shared, watch = self.shared, Stopwatch()
        before = {target.name: shared.model.get_submodule(target.name) for target in shared.targets.targets}
        with quantized(shared.model, shared.targets.targets, name) as stored, watch.stage("measure"):
            perplexity, divergence = self._measure(before)
        kept = shared.targets.total_numbers - shared.targets.target_numbers
        row = Row(
            name=name,
            kind="quantized",
            keep=1.0,
            keep_model=1.0,
            parameters=shared.targets.total_numbers,
            bytes=kept * shared.element_bytes + stored.bytes(shared.element_bytes),
            bytes_16=kept * 2 + stored.bytes(2),
            divergence=divergence,
            seconds=watch.seconds,
            notes=[stored.note],
            **self._figures(perplexity),
        )
        self.cells.save(name, row, extra)
        return row

    def cell(self, cell: Cell, of: Decomposed, number: int) -> Row:
        """Plan, factor, refine and measure; a cell that can't be done is a row with the reason."""
        self._say(number, cell.words)
        shared, work = self.shared, self.out / "work" / cell.name
        try:
            with put_back(shared.model, [target.name for target in shared.targets.targets]):
                row = self.factored(cell, of, work)
        except TwofoldError as error:  # what it had done is kept for another try
            row = skipped_row(cell, str(error))
            self._say(number, f"skipped: {error}")
        else:
            self.cells.save(cell.name, row)
            shutil.rmtree(work, ignore_errors=True)
        return row

    def factored(self, cell: Cell, of: Decomposed, work: Path) -> Row:
        shared, watch, recipe = self.shared, Stopwatch(), self.shared.recipe_of(cell)
        with watch.stage("plan"):
            evidence = self._evidence_of(cell, of, recipe)
            values = of.made.spectra.values
            plan = make_plan(shared.loaded.name, of.targets, values, recipe, shared.element_bytes, evidence)
        prepared = Prepared(shared.opened, of.targets, shared.data, True, of.made, evidence, plan)
        if ALLOCATIONS.get(recipe.allocate).again:
            with watch.stage("recalibrate"):
                recalibrate(prepared, recipe, folder=work / "recalibrated", quiet=shared.quiet)
        with watch.stage("factorize"):
            replaced = carry_out(prepared, quiet=shared.quiet)
        refined = []
        if recipe.refine:
            with watch.stage("refine"):
                refined = refine(prepared, replaced, recipe, folder=work, quiet=shared.quiet)
        with watch.stage("measure"):
            perplexity, divergence = self._measure(replaced)
        plan = prepared.plan
        return Row(
            **_place(cell),
            keep=plan.keep,
            keep_model=plan.keep_model,
            parameters=plan.model_after,
            bytes=plan.bytes_after,
            bytes_16=plan.model_copy(update={"element_bytes": 2}).bytes_after,
            divergence=divergence,
            predicted_divergence=plan.predicted_divergence,
            seconds={**of.seconds, **watch.seconds},
            refinement=refined,
            fingerprint=of.made.moments.fingerprint if of.made.moments is not None else "",
            notes=plan.notes,
            **self._figures(perplexity),
        )

    def _figures(self, perplexity: list[float]) -> dict[str, Any]:
        """Perplexities and their ratios to the dense model's.

        Raises:
            TwofoldError: if one is no number.
        """
        if not all(map(math.isfinite, perplexity)):
            raise TwofoldError("its logits hold NaN or infinity, so it has no perplexity; keep more of it")
        assert self.dense is not None
        return {
            "perplexity": perplexity,
            "ratio": [now / dense for now, dense in zip(perplexity, self.dense.perplexity, strict=True)],
        }

    def _measure(self, replaced: dict[str, nn.Module] | None) -> tuple[list[float], float | None]:
        """Perplexity on each text of the model as it is, and on the first its divergence from the dense one.

        Args:
            replaced: the dense modules whose places have others now; None for the dense model itself.
        """
        model, task, quiet = self.shared.model, self.shared.opened.need_task(), self.shared.quiet

        def predict(samples: Samples) -> Predict:
            return lambda i: task.outputs(model, samples.batch(i, i + 1))

        def dense(i: int) -> Tensor:
            with dense_again(model, replaced or {}):
                return predict(first)(i)

        (_, first), *others = self.shared.texts
        if self._reference is None:
            self._reference = Reference(dense, first, task, self.out / "work" / "dense", self.cells.mark, quiet=quiet)
        reference = self._reference
        found = reference.quality if replaced is None else reference.measure(predict(first), dense, quiet=quiet)
        further = [measure_quality([predict(text)], text, task, quiet=quiet)[0].perplexity for _, text in others]
        return [found.perplexity, *further], found.divergence

    def _evidence_of(self, cell: Cell, of: Decomposed, recipe: Recipe) -> Evidence:
        """What an allocation measures, once for all cells of an objective."""
        key = cell.objective, cell.allocate
        if key not in self._evidence:
            shared = self.shared
            samples = None if shared.data is None else shared.data.samples
            task, targets = shared.opened.need_task(), of.targets.targets
            work = Measurement(shared.model, task, targets, samples, of.made, recipe, shared.quiet)
            self._evidence[key] = gather(work, cell.allocate)
        return self._evidence[key]


def skipped_row(cell: Cell, reason: str) -> Row:
    """The row of a cell that was not measured."""
    return Row(**_place(cell), skipped=reason)


def _place(cell: Cell) -> dict[str, Any]:
    """Where a row stands in the grid."""
    return {
        "name": cell.words,
        "kind": "factored",
        "objective": cell.objective,
        "allocate": cell.allocate,
        "refine": cell.chain,
        "asked": cell.keep,
    }
