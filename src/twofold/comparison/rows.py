"""The rows of a comparison: the dense model, quantizations of it, and every cell, each taken from the folder or measured."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from torch import nn

from twofold.allocate import ALLOCATIONS
from twofold.comparison.cells import CellStore
from twofold.comparison.grid import Cell
from twofold.comparison.quantized import quantized
from twofold.comparison.record import ComparisonRow
from twofold.comparison.shared import GridSetup, SharedDecomposition
from twofold.errors import TwofoldError
from twofold.evaluation.reference import DenseReference
from twofold.evidence.base import Measurement
from twofold.factor.prepared import Prepared
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


class GridRunner:
    """Gives the rows, each taken from the folder or else measured."""

    def __init__(self, setup: GridSetup, out: Path, impossible: Mapping[Cell, str], baselines: list[str]) -> None:
        self.setup, self.out, self.impossible, self.baselines = setup, out, impossible, baselines
        self.store = CellStore(out, setup.belongs())
        self._reference: DenseReference | None = None
        self._evidence: dict[tuple[str, str], Evidence] = {}  # of an objective and an allocation, for all keep ratios
        self.number, self.total = 1, 1 + len(baselines) + sum(1 for _ in setup.grid.cells())
        self.dense: ComparisonRow | None = None

    def rows(self) -> Iterator[ComparisonRow]:
        """Yield the dense model first, then the baselines, then the cells of the grid in its order."""
        self.dense = self._unfactored("dense", self._measure_dense)
        yield self.dense
        for name in self.baselines:
            self.number += 1
            yield self._unfactored(name, partial(self._measure_baseline, name), str(torchao_version()))
        for objective, group in groupby(self.setup.grid.cells(), key=lambda cell: cell.objective):
            cells = list(group)
            stored = {cell: self.store.load(cell.name) for cell in cells}
            missing = [cell for cell in cells if stored[cell] is None and cell not in self.impossible]
            shared, reason = None, ""
            try:
                shared = self.setup.decompose(OBJECTIVES.get(objective)) if missing else None
            except TwofoldError as error:  # this objective does not go with the model; the others may
                reason = str(error)
                self._say(f"{objective} skipped: {reason}", self.number + 1)
            for cell in cells:
                self.number += 1
                row = stored[cell]
                if cell in self.impossible:
                    row = row_of(cell, skipped=self.impossible[cell])
                elif row is None:
                    row = row_of(cell, skipped=reason) if shared is None else self.cell(cell, shared)
                yield row
            shared = None  # its bases go before the next ones come
            self._evidence.clear()

    def _say(self, words: str, number: int | None = None) -> None:
        if not self.setup.quiet:
            say(f"row {number or self.number} of {self.total}: {words}")

    def _unfactored(self, name: str, measure: Callable[[], ComparisonRow], extra: str = "") -> ComparisonRow:
        """Return the row of the dense model or of a quantization of it."""
        row = self.store.load(name, extra)
        if row is None:
            self._say(name)
            row = measure()
            self.store.save(name, row, extra)
        return row

    def _measure_dense(self) -> ComparisonRow:
        numbers, watch = self.setup.targets.total_numbers, Stopwatch()
        figures = self._measure(None, watch)
        return self._whole("dense", "dense", lambda element: numbers * element, **figures, seconds=watch.seconds)

    def _measure_baseline(self, name: str) -> ComparisonRow:
        """Measure a quantization of the dense model."""
        targets, watch = self.setup.targets, Stopwatch()
        with quantized(self.setup.model, targets.targets, name) as stored:
            figures = self._measure(stored.replaced, watch)
        figures |= {"seconds": watch.seconds, "notes": [stored.note]}
        dense = targets.total_numbers - targets.target_numbers
        return self._whole(name, "quantized", lambda element: dense * element + stored.bytes(element), **figures)

    def _whole(
        self, name: str, kind: Literal["dense", "quantized"], size: Callable[[int], int], **figures: Any
    ) -> ComparisonRow:
        """Return the row of a model that keeps all its numbers.

        Args:
            size: from the bytes of a number to those of the model.
        """
        return ComparisonRow(
            name=name,
            kind=kind,
            keep=1.0,
            keep_model=1.0,
            parameters=self.setup.targets.total_numbers,
            bytes=size(self.setup.element_bytes),
            bytes_16=size(2),
            **figures,
        )

    def cell(self, cell: Cell, shared: SharedDecomposition) -> ComparisonRow:
        """Plan, factor, refine and measure; a cell that can't be done is a row with the reason."""
        self._say(cell.words)
        model, work = self.setup.model, self.out / "work" / cell.name
        try:
            with put_back(model, [target.name for target in self.setup.targets.targets]):
                row = self.factored(cell, shared, work)
        except TwofoldError as error:  # what it had done is kept for another try
            row = row_of(cell, skipped=str(error))
            self._say(f"skipped: {error}")
        else:
            self.store.save(cell.name, row)
            shutil.rmtree(work, ignore_errors=True)
        return row

    def factored(self, cell: Cell, shared: SharedDecomposition, work: Path) -> ComparisonRow:
        """Plan, factor, refine and measure one cell.

        Args:
            work: the folder of its unfinished state.

        Raises:
            TwofoldError: if it can't be done.
        """
        setup, watch, recipe = self.setup, Stopwatch(), self.setup.recipe_of(cell)
        quiet, decomposition = setup.quiet, shared.decomposition
        with watch.stage("plan"):
            evidence = self._evidence_of(cell, shared, recipe)
            values = decomposition.spectra.values
            plan = make_plan(setup.loaded.name, shared.targets, values, recipe, setup.element_bytes, evidence)
        prepared = Prepared(setup.opened, shared.targets, setup.data, True, decomposition, evidence, plan)
        if ALLOCATIONS.get(recipe.allocate).again:
            with watch.stage("recalibrate"):
                recalibrate(prepared, recipe, folder=work / "recalibrated", quiet=quiet)
        with watch.stage("factorize"):
            replaced = prepared.factorize(quiet=quiet)
        refined = []
        if recipe.refine:
            with watch.stage("refine"):
                refined = refine(prepared, replaced, recipe, folder=work, quiet=quiet)
        figures = self._measure(replaced, watch)
        plan = prepared.plan
        return row_of(
            cell,
            keep=plan.keep,
            keep_model=plan.keep_model,
            parameters=plan.model_after,
            bytes=plan.bytes_after,
            bytes_16=plan.model_copy(update={"element_bytes": 2}).bytes_after,
            predicted_divergence=plan.predicted_divergence,
            seconds={**shared.seconds, **watch.seconds},
            refinement=refined,
            fingerprint=decomposition.moments.fingerprint if decomposition.moments is not None else "",
            notes=plan.notes,
            **figures,
        )

    def _measure(self, replaced: dict[str, nn.Module] | None, watch: Stopwatch) -> dict[str, Any]:
        """Measure the model as it is on each text, by perplexity or else by its divergence from the dense one and by its task.

        Where it is by perplexity, the divergence is measured on the first text alone.

        Args:
            replaced: the dense modules whose places have others now; None for the dense model itself.

        Raises:
            TwofoldError: if what it is measured by is no number.
        """
        model, task, quiet = self.setup.model, self.setup.opened.need_task(), self.setup.quiet

        def predict(samples: Samples) -> Predict:
            return lambda i: task.outputs(model, samples.batch(i, i + 1))

        def dense_of(samples: Samples) -> Predict:
            return dense_again(model, replaced or {})(predict(samples))

        (_, first), *others = self.setup.texts
        dense = dense_of(first)
        with watch.stage("measure"):
            if self._reference is None:
                folder = self.out / "work" / "dense"
                self._reference = DenseReference(dense, first, task, folder, self.store.mark, quiet=quiet)
            reference = self._reference
            quality = reference.quality if replaced is None else reference.measure(predict(first), dense, quiet=quiet)
            further = []
            for _, text in others:
                pair = [predict(text)] if task.perplexity else [dense_of(text), predict(text)]
                further.append(measure_quality(pair, text, task, quiet=quiet)[-1])
            scores = []
            for _, text in self.setup.texts if not task.perplexity else []:
                own = task.score(self.setup.loaded, text)
                scores.append({name: score for name, score in own.items() if math.isfinite(score)})
        qualities = [quality, *further]
        measured = [each.perplexity if task.perplexity else each.divergence for each in qualities]
        if not task.perplexity and replaced is None:
            measured = [0.0 for _ in qualities]
        figures = [figure for figure in measured if figure is not None and math.isfinite(figure)]
        if len(figures) < len(measured):
            said, what = ("logits", "perplexity") if task.perplexity else ("outputs", "divergence")
            raise TwofoldError(
                f"the {what} of {self.setup.loaded.name} itself is not a number on these texts"
                if replaced is None
                else f"its {said} hold NaN or infinity, so it has no {what}; keep more of it"
            )
        if not task.perplexity:
            return {"divergences": figures, "scores": scores, "divergence": quality.divergence}
        original = figures if self.dense is None else self.dense.perplexity
        ratio = [now / dense for now, dense in zip(figures, original, strict=True)]
        return {"perplexity": figures, "ratio": ratio, "divergence": quality.divergence}

    def _evidence_of(self, cell: Cell, shared: SharedDecomposition, recipe: Recipe) -> Evidence:
        """Return what an allocation measures, once for all cells of an objective."""
        key = cell.objective, cell.allocate
        if key not in self._evidence:
            setup, targets = self.setup, shared.targets.targets
            samples, task = None if setup.data is None else setup.data.samples, setup.opened.need_task()
            work = Measurement(setup.model, task, targets, samples, shared.decomposition, recipe, setup.quiet)
            self._evidence[key] = gather(work, cell.allocate)
        return self._evidence[key]


def row_of(cell: Cell, **figures: Any) -> ComparisonRow:
    """Return the row of a cell: where it stands in the grid, and its figures or why there are none."""
    methods: dict[str, Any] = {"objective": cell.objective, "allocate": cell.allocate, "refine": cell.chain}
    return ComparisonRow(name=cell.words, kind="factored", asked=cell.keep, **methods, **figures)
