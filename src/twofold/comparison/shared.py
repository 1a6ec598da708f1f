"""What all cells of a comparison share: the model, its targets, the texts, and the moments for every objective."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from twofold.allocate import ALLOCATIONS
from twofold.calibrate.calibrate import calibrate, used_targets
from twofold.calibrate.fingerprint import model_hash, spectra_mark
from twofold.calibrate.moments import Moments
from twofold.calibrate.opened import Opened
from twofold.calibrate.request import request_statistics
from twofold.comparison.grid import Cell, Grid
from twofold.comparison.record import Text
from twofold.decompose.decompose import Decomposition
from twofold.errors import TwofoldError
from twofold.host.clock import Stopwatch
from twofold.host.progress import say
from twofold.model.load import LoadedModel, check_ids, need_tokenizer, targets_of, window_limit
from twofold.model.target import Targets
from twofold.objectives import OBJECTIVES, Objective, Statistic
from twofold.planning.centre import centring_needs, mark_centred
from twofold.recipe import Recipe
from twofold.run.check import check_methods
from twofold.run.open import open_for
from twofold.run.prepare import decompose_under, with_structures
from twofold.task import Data, Samples, Task
from twofold.task.text.held_out import evaluation_windows
from twofold.task.text.settings import HELD_OUT, OF_ROWS
from twofold.version import __version__

EVERY = 1_000_000  # windows, where all are measured on
UNRELATED = {  # settings that a row does not depend on, or whose tokens and weights are hashed in their place
    "model", "keep", "budget", "objective", "allocate", "refine", "calibration", "dataset_config", "dataset_split",
    "text_column", "audio_column", "image_column", "target_column", "label_column", "chat", "skip_bad", "eval_text", "memory",
    "stream", "activations", "revision", "trust_remote_code", "dequantize", "device", "dtype",
}  # fmt: skip


@dataclass(frozen=True)
class SharedDecomposition:
    """What the cells of one objective share."""

    targets: Targets  # without those that its moments say nothing about
    decomposition: Decomposition
    seconds: dict[str, float]  # of the decompositions, and of the calibration if this run did it


@dataclass
class GridSetup:
    """What all cells share. The moments are collected when the first cell asks for them."""

    grid: Grid
    recipe: Recipe  # of one cell, for what they share
    opened: Opened
    targets: Targets
    hashed: str  # of the model
    data: Data | None  # to calibrate and to refine on
    calibrated: bool  # whether any cell looks at them
    texts: list[tuple[Text, Samples]]  # to measure on
    watch: Stopwatch
    quiet: bool
    notes: list[str] = field(default_factory=list)
    _moments: Moments | None = None

    @property
    def loaded(self) -> LoadedModel:
        return self.opened.loaded

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def element_bytes(self) -> int:
        return self.loaded.stored_dtype.itemsize

    def recipe_of(self, cell: Cell) -> Recipe:
        """Return the recipe of a cell, in the window that the model has positions for."""
        return self.opened.fitted(self.grid.recipe(cell), quiet=True)

    def belongs(self) -> dict[str, Any]:
        """Return what every row depends on, by names that a reader knows."""
        residence = self.loaded.residence
        # What an objective sets for itself is no setting of all.
        own = {name for kernel in self.grid.kernels for name in OBJECTIVES.get(kernel).defaults} - UNRELATED
        return {
            **self.recipe.model_dump(mode="json", exclude=UNRELATED),
            **{name: self.grid.settings.get(name, Recipe.model_fields[name].default) for name in sorted(own)},
            "version": __version__,
            "libraries": [torch.__version__, transformers.__version__],
            "model": self.hashed,
            "calibration text": self.data.samples.sha256 if self.data is not None else "",
            "held-out text": self.data.held_out.sha256 if self.data is not None else "",
            "texts to measure on": [[text.domain, text.sha256] for text, _ in self.texts],
            "dtype": str(residence.dtype),
            "device": residence.device.type,
        }

    def moments(self) -> Moments:
        """Return the moments for the union of what all objectives need, collected in one pass or taken from the cache."""
        if self._moments is None:
            assert self.data is not None
            recipes = [self.recipe.model_copy(update={"objective": name}) for name in self.grid.kernels]
            needs = union_of_needs(self.grid).union(*(centring_needs(recipe, self.opened.task) for recipe in recipes))
            samples = self.data.samples
            self.targets, self._moments, _ = calibrate(
                self.recipe, self.opened, self.targets, needs, samples, self.hashed, self.watch, quiet=self.quiet
            )
        return self._moments

    def decompose(self, objective: Objective) -> SharedDecomposition:
        """Decompose all targets under one objective, as if it were the only one."""
        targets, moments = self.targets, None
        recipe = self.recipe.model_copy(update={"objective": objective.name})
        if objective.needs:
            everything = self.moments()
            targets = mark_centred(self.targets, recipe, self.opened.task)  # now with the groups that share an input
            moments = everything.only(request_statistics(targets.targets, targets.groups, objective.needs))
            targets = used_targets(with_structures(self.opened, targets, recipe), moments)
        watch = Stopwatch()
        if objective.needs and "calibrate" in self.watch.seconds:
            watch.seconds["calibrate"] = self.watch.seconds["calibrate"]
        with watch.stage("decompose"):
            mark = spectra_mark(
                self.hashed, self._moments.fingerprint if self._moments is not None else "", recipe, targets
            )
            decomposition = decompose_under(self.opened, targets, recipe, moments, mark, quiet=self.quiet)
        return SharedDecomposition(targets, decomposition, watch.seconds)


def union_of_needs(grid: Grid) -> frozenset[Statistic]:
    """Return what the objectives of a grid ask for, together."""
    return frozenset().union(*(OBJECTIVES.get(name).needs for name in grid.kernels))


def _heaviest(grid: Grid, recipe: Recipe) -> Recipe:
    """Return the recipe that takes the most memory: refined, if any cell that goes with its objective is."""
    for chain in sorted(grid.chains, key=len, reverse=True):
        refined = recipe.model_copy(update={"refine": list(chain)})
        with suppress(TwofoldError):
            check_methods(refined)
            return refined
    return recipe


def set_up(grid: Grid, impossible: Collection[Cell] = (), *, quiet: bool = False) -> GridSetup:
    """Load the model and read the texts, once for all cells.

    Args:
        impossible: cells that will be skipped, whatever the model is.

    Raises:
        TwofoldError: if the model does not fit in memory, gives no token logits, or a text can't be used.
    """
    watch = Stopwatch()
    possible = [cell for cell in grid.cells() if cell not in impossible] or list(grid.cells())
    most = max(possible, key=lambda cell: (len(OBJECTIVES.get(cell.objective).needs), cell.keep))
    recipe = grid.recipe(replace(most, refine=()))
    with watch.stage("load"):
        opened = open_for(_heaviest(grid, recipe), quiet=True)
    loaded = opened.loaded
    if loaded.residence.streamed:
        raise TwofoldError(
            "a comparison holds the model whole in memory, and this one would be worked through block by block; "
            "give it more with `memory`, or compress it to one size at a time: twofold compress"
        )
    task = opened.need_task("compared on a text")
    recipe = opened.fitted(recipe, quiet=quiet)
    notes: list[str] = []
    with watch.stage("texts"):
        texts = _texts(grid, recipe, loaded, task)
    targets = targets_of(loaded, recipe.include, recipe.exclude)
    with watch.stage("hash"):
        hashed = model_hash(loaded.model, loaded.shards)
    data: Data | None = None
    measuring = any(ALLOCATIONS.get(cell.allocate).measure is not None for cell in grid.cells())
    # Texts that need no sampling are read all the same, so that a cell that is added later finds the same ones.
    named = recipe.calibration != ["self"] and not recipe.continuations
    calibrated = bool(union_of_needs(grid)) or any(grid.chains) or measuring
    if named or calibrated or recipe.eval_text is None:
        with watch.stage("texts"):
            # Windows to stop on are set aside for all cells.
            aside = HELD_OUT + (recipe.eval_windows if recipe.eval_text is None else 0)
            data = task.data(loaded, recipe, hashed, held_out=aside, quiet=quiet)
        if data.units < data.asked - (recipe.window if task.streams else 0):
            what = "text" if task.streams else "data"
            notes.append(
                f"the calibration {what} gives {data.units:,} {data.samples.unit} of the {data.asked:,} asked for"
            )
            if not quiet:
                say(notes[-1])
    if recipe.eval_text is None:
        assert data is not None
        held_out = data.to_measure(recipe.eval_windows)
        if not len(held_out):
            raise TwofoldError(
                "the calibration text is too short to hold some of it out to measure on; name a text with `eval_text`"
            )
        texts.insert(0, _described(f"held-out {data.samples.source}", "in", held_out))
    if not task.predicts(loaded.model, texts[0][1]):
        what = (
            "token logits, so it has no perplexity"
            if task.fallback
            else f"outputs of the task {task.name}, so there is nothing"
        )
        raise TwofoldError(f"{loaded.name} gives no {what} to compare")
    return GridSetup(grid, recipe, opened, targets, hashed, data, calibrated, texts, watch, quiet, notes)


def _texts(grid: Grid, recipe: Recipe, loaded: LoadedModel, task: Task) -> list[tuple[Text, Samples]]:
    """Read the texts, or other data, that are named to measure on; the one of the calibration's kind first."""
    window, windows = min(1024, window_limit(loaded.model) or 1024), grid.eval_windows or None
    sources = [grid.settings.get("eval_text"), *grid.other_text]
    how: dict[str, Any] = {name: grid.settings[name] for name in OF_ROWS if name in grid.settings}
    texts = []
    for i, source in enumerate(sources):
        if source is None:
            continue
        samples: Samples | None
        if task.streams:
            read = evaluation_windows(str(source), need_tokenizer(loaded), window=window, windows=windows, **how)
            check_ids(read.ids, loaded)
            samples = task.of_windows(read, loaded)
        else:
            named = {"eval_text": str(source), "eval_windows": windows or EVERY}
            samples = task.measured(loaded, recipe.model_copy(update=named))
            assert samples is not None
        texts.append(_described(Path(str(source)).name, "out" if i else "in", samples))
    return texts


def _described(name: str, domain: Literal["in", "out"], samples: Samples) -> tuple[Text, Samples]:
    windows, window = samples.shape
    size = "" if samples.each == "windows" else samples.words
    sha256, begin = samples.sha256, samples.begin
    return Text(
        name=name, domain=domain, windows=windows, window=window, size=size, sha256=sha256, begin=begin
    ), samples
