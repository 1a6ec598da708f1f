"""Moments measured again on the model as its plan makes it; the ranks and factors are then chosen anew by the mean of both."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from twofold.calibrate.calibrate import reuse
from twofold.calibrate.request import request_statistics
from twofold.calibrate.sweep import collect_moments
from twofold.decompose.decompose import decompose_targets
from twofold.decompose.spectra import Spectra
from twofold.factor.integers import rest_names
from twofold.factor.prepared import Prepared
from twofold.model.blocks import plain_chain
from twofold.model.kinds import dense_weight
from twofold.nn.places import put_back
from twofold.planning.make import make_plan
from twofold.planning.settings import Planning

SHARE = 1 / 3  # what the moments of the factored model weigh; measured, docs/experiments.md


def recalibrate(prepared: Prepared, recipe: Planning, *, folder: Path | None = None, quiet: bool = False) -> None:
    """Measure the moments again on the model as its plan makes it, and decompose and plan anew by the mean of both.

    The moments are those of the dense weights, with the inputs and gradients that the factored model gives: the curvature between
    the two models counts, and no longer that at the dense one alone. The model is dense again afterwards.

    Args:
        folder: where the new moments are kept, so that a killed run takes them up; in memory if it is None.
    """
    moments, data, loaded = prepared.moments, prepared.data, prepared.loaded
    assert moments is not None and data is not None
    targets, model, task = prepared.targets.targets, loaded.model, prepared.opened.need_task()
    request = request_statistics(targets, prepared.targets.groups, prepared.objective.needs)
    model_of = prepared.plan.model_dump_json(include={"entries", "dense"})  # what the plan makes of the model
    mark = hashlib.sha256(json.dumps([moments.fingerprint, recipe.damping, model_of]).encode()).hexdigest()
    again = None if folder is None else reuse(folder, mark, request, named=False)
    if again is None:
        weights = {target.name: dense_weight(model.get_submodule(target.name)).detach() for target in targets}
        with put_back(model, [*weights, *rest_names(prepared.plan, model)]):
            prepared.apply(prepared.plan, quiet=quiet)
            again = collect_moments(
                loaded.residence, targets, request, data.samples, task,
                empty=replace(moments, sums={}, fingerprint=mark), seed=recipe.seed, curvature=recipe.curvature,
                draws=task.draws(data.samples, recipe.draws), batch_size=recipe.batch_size, weights=weights, folder=folder,
                quiet=quiet,
            )  # fmt: skip
    old, new = moments.sums, again.sums
    mixed = {name: old[name] + SHARE * (new[name].to(old[name]) - old[name]) for name in request.names()}
    moments = replace(moments, sums={**old, **mixed}, fingerprint=mark)
    prepared.decomposition = replace(prepared.decomposition, moments=moments, spectra=Spectra(None, mark))
    chain, spectra = plain_chain(model), prepared.spectra.values
    decompose_targets(loaded.residence, prepared.targets, prepared.decomposition, chain=chain, quiet=quiet)
    element, evidence = loaded.stored_dtype.itemsize, prepared.evidence
    prepared.plan = make_plan(loaded.name, prepared.targets, spectra, recipe, element, evidence)
