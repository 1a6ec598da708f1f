"""What an allocation looks at beside the spectra, measured on the model when it asks for it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pydantic
from torch import Tensor

from twofold.allocate.base import get_allocation
from twofold.allocate.sensitivity import GRID
from twofold.calibrate.moments import Moments
from twofold.decompose.spectra import Spectra
from twofold.errors import TwofoldError
from twofold.host.cache import cache_folder
from twofold.host.files import write_text
from twofold.host.progress import say
from twofold.model.load import LoadedModel
from twofold.model.weights import Target
from twofold.objectives.base import Objective
from twofold.planning.evidence.base import Evidence
from twofold.planning.evidence.first_order import component_scores
from twofold.planning.evidence.rounding import measure_rounding
from twofold.planning.evidence.second_order import rank_losses
from twofold.planning.evidence.truncated import sensitivities
from twofold.settings.recipe import Recipe
from twofold.task.texts import TokenWindows


class _Table(pydantic.BaseModel, extra="forbid", ser_json_inf_nan="constants"):
    """Perplexities by the name of the weight, in the order of the grid, and what they belong to."""

    mark: str
    perplexities: dict[str, list[float]] = {}


def gather(
    loaded: LoadedModel,
    recipe: Recipe,
    targets: list[Target],
    windows: TokenWindows | None,
    spectra: Spectra,
    moments: Moments | None,
    objective: Objective,
    *,
    quiet: bool = False,
) -> Evidence:
    """Measure what the allocation of a recipe asks for; nothing for most. The perplexities are kept in the cache.

    Raises:
        TwofoldError: if the model gives no logits to measure with.
    """
    if recipe.bits == "auto":
        return Evidence(
            rounding=measure_rounding(loaded.model, targets, spectra, moments, objective, recipe, quiet=quiet)
        )
    needs = get_allocation(recipe.allocate).needs
    # Losses of the unit "weight" are no means over tokens.
    tokens = windows.tokens if windows is not None and objective.loss != "weight" else 1
    if not needs or windows is None:
        return Evidence(tokens)
    model: Any = loaded.model
    if not model.can_generate():
        raise TwofoldError(
            f"--allocate {recipe.allocate} measures how well the next token is predicted, which this model does not do; "
            "use --allocate global"
        )
    if "scores" in needs:
        scores = component_scores(model, targets, windows.ids, spectra, moments, objective, recipe.damping, quiet=quiet)
        return Evidence(tokens, scores=scores)
    if "curve" in needs:
        curves = rank_losses(
            model, targets, windows.ids, spectra, moments, objective, recipe.damping,
            seed=recipe.seed, curvature=recipe.curvature, quiet=quiet,
        )  # fmt: skip
        return Evidence(tokens, curves=curves)
    table = _perplexities(loaded, recipe, targets, windows, spectra, moments, objective, quiet)
    return Evidence(tokens, {name: np.array(row) for name, row in table.items()})


def _perplexities(
    loaded: LoadedModel,
    recipe: Recipe,
    targets: list[Target],
    windows: TokenWindows,
    spectra: Spectra,
    moments: Moments | None,
    objective: Objective,
    quiet: bool,
) -> dict[str, list[float]]:
    """The sensitivities of every weight; those of an earlier run, or of one that was stopped, are not measured again."""
    model: Any = loaded.model
    measured_on = windows.ids[: recipe.sensitivity_windows]
    told = [spectra.mark, windows.sha256, recipe.sensitivity_windows, recipe.form, recipe.dtype, recipe.device, GRID]
    mark = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    path = cache_folder() / "sensitivity" / f"{mark[:24]}.json"
    table = _Table(mark=mark)
    try:
        found = _Table.model_validate_json(path.read_text(encoding="utf-8"))
        if found.mark == mark and all(len(row) == len(GRID) for row in found.perplexities.values()):
            table = found
    except (OSError, ValueError):  # none, or none that can be read
        pass
    lost = False

    def keep(known: dict[str, list[float]]) -> None:
        nonlocal lost
        try:
            write_text(path, _Table(mark=mark, perplexities=known).model_dump_json())
        except TwofoldError as error:
            if not lost:
                say(f"the sensitivities are not kept for another run: {error}")
            lost = True

    def logits(ids: Tensor) -> Tensor:
        return model(input_ids=ids.to(model.device)).logits  # type: ignore[no-any-return]

    training = model.training
    model.eval()
    try:
        return sensitivities(
            model,
            logits,
            targets,
            measured_on,
            spectra,
            moments,
            objective,
            recipe.damping,
            recipe.form,
            table.perplexities,
            keep,
            quiet=quiet,
        )
    finally:
        model.train(training)
