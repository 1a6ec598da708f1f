"""What all cells of a comparison share: the model, its targets, the texts, and the moments for every objective."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from twofold.allocate import ALLOCATIONS
from twofold.calibrate.calibrate import calibrate, used_targets
from twofold.calibrate.fingerprint import model_hash, spectra_mark
from twofold.calibrate.moments import Moments
from twofold.calibrate.request import request_statistics
from twofold.comparison.grid import Cell, Grid
from twofold.comparison.record import Text
from twofold.decompose.decompose import Decomposition, decompose
from twofold.decompose.spectra import Spectra
from twofold.errors import TwofoldError
from twofold.host.clock import Stopwatch
from twofold.host.progress import say
from twofold.host.quiet import first_line
from twofold.model.blocks import plain_chain
from twofold.model.load import LoadedModel, Opened, check_ids, need_tokenizer, positions
from twofold.model.weights import Targets, find_targets
from twofold.objectives import OBJECTIVES, Objective, Statistic
from twofold.recipe import Recipe
from twofold.run.check import check_methods
from twofold.run.open import open_for
from twofold.run.prepare import RESIDENT_BLOCKS, with_structures
from twofold.task.text.held_out import evaluation_windows
from twofold.task.text.settings import HELD_OUT
from twofold.task.text.texts import TokenWindows
from twofold.task.text.windows import calibration_windows, fit_window
from twofold.version import __version__

APART = {  # settings that a row does not depend on, or whose tokens and weights are hashed in their place
    "model", "keep", "budget", "objective", "allocate", "refine", "calibration", "dataset_config", "dataset_split",
    "text_column", "eval_text", "memory", "stream", "activations", "revision", "trust_remote_code", "device", "dtype",
}  # fmt: skip


def ids_hash(ids: Tensor) -> str:
    """The hash of token ids."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Decomposed:
    """What the cells of one objective share."""

    targets: Targets  # without those that its moments say nothing about
    made: Decomposition
    seconds: dict[str, float]  # of the decompositions, and of the calibration if this run did it


@dataclass
class Ground:
    """What all cells stand on. The moments are collected when the first cell asks for them."""

    grid: Grid
    recipe: Recipe  # of one cell, for what they share
    opened: Opened
    targets: Targets
    hashed: str  # of the model
    windows: TokenWindows | None  # to calibrate and to refine on
    calibrated: bool  # whether any cell looks at them
    texts: list[tuple[Text, Tensor]]  # to measure on, windows (count, window)
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

    @property
    def fingerprint(self) -> str:
        """Of the moments; empty if no cell has asked for them."""
        return self._moments.fingerprint if self._moments is not None else ""

    def recipe_of(self, cell: Cell) -> Recipe:
        """The recipe of a cell, in the window that the model has positions for."""
        return fit_window(self.grid.recipe(cell), self.loaded, quiet=True)

    def belongs(self) -> dict[str, Any]:
        """What every row depends on, by names that a reader knows."""
        residence = self.loaded.residence
        return {
            **self.recipe.model_dump(mode="json", exclude=APART),
            "version": __version__,
            "libraries": [torch.__version__, transformers.__version__],
            "model": self.hashed,
            "calibration text": self.windows.sha256 if self.windows is not None else "",
            "held-out text": ids_hash(self.windows.held_out) if self.windows is not None else "",
            "texts to measure on": [[text.domain, text.sha256] for text, _ in self.texts],
            "dtype": str(residence.dtype),
            "device": residence.device.type,
        }

    def moments(self) -> Moments:
        """The moments for the union of what all objectives need, collected in one pass or taken from the cache."""
        if self._moments is None:
            assert self.windows is not None
            needs = union_of_needs(self.grid)
            self.targets, self._moments, _ = calibrate(
                self.recipe, self.opened, self.targets, needs, self.windows, self.hashed, self.watch, quiet=self.quiet
            )
        return self._moments

    def decomposed(self, objective: Objective) -> Decomposed:
        """All targets decomposed under one objective, as if it were the only one."""
        targets, moments = self.targets, None
        recipe = self.recipe.model_copy(update={"objective": objective.name})
        if objective.needs:
            everything = self.moments()
            targets = self.targets  # now with the groups that share an input
            moments = everything.only(request_statistics(targets.targets, targets.groups, objective.needs))
            targets = used_targets(with_structures(self.loaded, targets, recipe), moments)
        watch = Stopwatch()
        with watch.stage("decompose"):
            spectra = Spectra(None, spectra_mark(self.hashed, self.fingerprint, recipe))
            made = Decomposition(moments, objective, recipe.damping, spectra)
            chain = plain_chain(self.model)
            decompose(self.loaded.residence, targets, made, chain=chain, blocks=RESIDENT_BLOCKS, quiet=self.quiet)
        shared = {name: spent for name, spent in self.watch.seconds.items() if name == "calibrate" and objective.needs}
        return Decomposed(targets, made, {**shared, **watch.seconds})


def union_of_needs(grid: Grid) -> frozenset[Statistic]:
    """What the objectives of a grid ask for, together."""
    return frozenset().union(*(OBJECTIVES.get(name).needs for name in grid.kernels))


def _heaviest(grid: Grid, recipe: Recipe) -> Recipe:
    """The recipe that takes the most memory: refined, if any cell that goes with its objective is."""
    for chain in sorted(grid.chains, key=len, reverse=True):
        refined = recipe.model_copy(update={"refine": list(chain)})
        with suppress(TwofoldError):
            check_methods(refined)
            return refined
    return recipe


def lay(grid: Grid, impossible: Collection[Cell] = (), *, quiet: bool = False) -> Ground:
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
    if getattr(loaded.model.config, "is_encoder_decoder", False):
        raise TwofoldError(
            f"{grid.settings['model']} is an encoder-decoder model, which can't be compared on a text yet"
        )
    recipe = fit_window(recipe, loaded, quiet=quiet)
    notes: list[str] = []
    with watch.stage("texts"):
        texts = _texts(grid, loaded)
    targets = find_targets(loaded.model, recipe.include, recipe.exclude)
    with watch.stage("hash"):
        hashed = model_hash(loaded.model, loaded.shards)
    windows: TokenWindows | None = None
    measuring = any(ALLOCATIONS.get(name).measure is not None for name in grid.allocate)
    # Texts that need no sampling are read all the same, so that a cell that is added later finds the same ones.
    named = recipe.calibration != ["self"] and not recipe.continuations
    calibrated = bool(union_of_needs(grid)) or any(grid.chains) or measuring
    if named or calibrated or recipe.eval_text is None:
        with watch.stage("texts"):
            # Windows to stop on are set aside for all cells.
            aside = HELD_OUT + (recipe.eval_windows if recipe.eval_text is None else 0)
            windows = calibration_windows(loaded, recipe, hashed, held_out=aside, quiet=quiet)
        if windows.tokens < windows.asked - recipe.window:
            notes.append(f"the calibration text gives {windows.tokens:,} tokens of the {windows.asked:,} asked for")
            if not quiet:
                say(notes[-1])
    if recipe.eval_text is None:
        assert windows is not None
        held_out = windows.held_out[: recipe.eval_windows]
        if not len(held_out):
            raise TwofoldError(
                "the calibration text is too short to hold some of it out to measure on; name a text with `eval_text`"
            )
        texts.insert(0, _text(f"held-out {windows.source}", "in", held_out))
    _check_logits(loaded, texts[0][1])
    return Ground(grid, recipe, opened, targets, hashed, windows, calibrated, texts, watch, quiet, notes)


def _texts(grid: Grid, loaded: LoadedModel) -> list[tuple[Text, Tensor]]:
    """The texts that are named to measure on; the one of the calibration's kind first."""
    window = min(1024, positions(loaded.model) or 1024)
    named = [("in", one) for one in [grid.settings.get("eval_text")] if one is not None]
    named += [("out", one) for one in grid.other_text]
    texts = []
    for domain, source in named:
        ids = evaluation_windows(str(source), need_tokenizer(loaded), window=window, windows=grid.eval_windows or None)
        check_ids(ids, loaded)
        texts.append(_text(Path(str(source)).name, domain, ids))
    return texts


def _text(name: str, domain: str, ids: Tensor) -> tuple[Text, Tensor]:
    described = {
        "name": name,
        "domain": domain,
        "windows": ids.shape[0],
        "window": ids.shape[1],
        "sha256": ids_hash(ids),
    }
    return Text.model_validate(described), ids


@torch.no_grad()
def _check_logits(loaded: LoadedModel, windows: Tensor) -> None:
    """Refuse a model without logits over the vocabulary."""
    model: Any = loaded.model
    assert isinstance(model, nn.Module)
    try:
        logits = getattr(model(input_ids=windows[:1, :8].to(loaded.residence.device)), "logits", None)
    except Exception as error:  # an architecture that needs other inputs fails in its own way
        raise TwofoldError(f"{loaded.name} does not run on text alone ({first_line(error)})") from error
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise TwofoldError(f"{loaded.name} gives no token logits, so it has no perplexity to compare")
