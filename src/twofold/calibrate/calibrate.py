"""The calibration of a run: the moments of an earlier one if they fit, else new ones; one process at a time collects the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import Timeout

from twofold.calibrate.fingerprint import fingerprint, moments_path, spectra_mark
from twofold.calibrate.moments import DESCRIPTION, Moments
from twofold.calibrate.opened import Opened
from twofold.calibrate.request import Request, request_statistics
from twofold.calibrate.settings import Calibrating
from twofold.calibrate.sweep import collect_moments
from twofold.errors import TwofoldError
from twofold.host import processes
from twofold.host.clock import Stopwatch
from twofold.host.files import lock_of
from twofold.host.folders import check_space
from twofold.host.progress import say
from twofold.host.unfinished import Work
from twofold.model.blocks import stretches
from twofold.model.survey import survey
from twofold.model.target import Targets
from twofold.model.weights import find_groups
from twofold.objectives import OBJECTIVES, Statistic, without_data
from twofold.task import Samples, Task, on_device


def calibrate(
    recipe: Calibrating,
    opened: Opened,
    targets: Targets,
    needs: frozenset[Statistic],
    samples: Samples,
    hashed: str,
    watch: Stopwatch,
    *,
    moments_folder: Path | None = None,
    work: Work | None = None,
    quiet: bool = False,
) -> tuple[Targets, Moments, bool]:
    """Collect the moments of a model on samples, or take those of an earlier run if they fit.

    Args:
        needs: what the objectives that they will serve ask for.
        hashed: the hash of the model.

    Returns:
        The targets with the groups that share an input, the moments, and whether they are those of an earlier run.
    """
    loaded, residence, task = opened.loaded, opened.loaded.residence, opened.need_task()
    before: frozenset[str] = frozenset()
    with watch.stage("texts"):
        if residence.streamed:
            surveyed = survey(loaded, targets.targets, task.example(loaded.model))
            groups, before = surveyed.groups, surveyed.before
        else:
            groups = _groups(loaded.model, targets, samples, task)
        targets = replace(targets, groups=groups)
    request = request_statistics(targets.targets, groups, needs)
    draws = task.draws(samples, recipe.draws)
    mark = fingerprint(hashed, samples, request, recipe, residence.dtype, draws)
    path = moments_folder or moments_path(mark)
    if work is not None:
        work.belongs_to(spectra_mark(hashed, mark, recipe, targets))
        work.update(stage="calibrating", moments=str(path))
    with _alone(path, quiet), watch.stage("calibrate"):
        moments = reuse(path, mark, request, named=moments_folder is not None)
        reused = processes.agree(moments is not None)
        if moments is None or not reused:
            check_space(path, 4 * request.numbers + _states_bytes(opened, recipe, samples))
            about = {"model": loaded.name, "source": samples.source, "seed": str(recipe.seed)}
            moments = collect_moments(
                residence,
                targets.targets,
                request,
                samples,
                task,
                empty=Moments({}, 0, groups, mark, about),
                parts=stretches(opened.chain, opened.blocks) if opened.blocks is not None else None,
                before=before,
                seed=recipe.seed,
                curvature=recipe.curvature,
                draws=draws,
                batch_size=recipe.batch_size,
                folder=path,
                on_disk=recipe.activations == "disk",
                quiet=quiet,
            )
    if reused:
        watch.seconds.pop("calibrate")
        if not quiet:
            say(f"the moments of an earlier run fit and are used again ({path})")
    return targets, moments, reused


def used_targets(targets: Targets, moments: Moments) -> Targets:
    """Return the targets that the moments say something about; the others stay dense, with the reason.

    Raises:
        TwofoldError: if none is left.
    """
    used = targets.without(moments.unused(targets.targets))
    if not used.targets:
        raise TwofoldError(
            "nothing to factorize: no linear layer takes part when the model runs on the calibration text"
        )
    return used


@contextmanager
def _alone(folder: Path, quiet: bool) -> Iterator[None]:
    """Keep other runs on this machine from collecting the same moments within the block; the lock ends with the process."""
    lock = lock_of(folder)
    if processes.is_main():
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            if not quiet:
                say(f"another run collects the same moments ({folder}); waiting for it")
            lock.acquire()
    processes.wait()
    try:
        yield
    finally:
        lock.release()


def _states_bytes(opened: Opened, recipe: Calibrating, samples: Samples) -> int:
    """Return what the hidden states between stretches take on the disk."""
    if opened.blocks is None or opened.chain is None or recipe.activations != "disk":
        return 0
    config = opened.loaded.model.config.get_text_config()
    width = int(getattr(config, "hidden_size", 0) or 0)
    states = len(stretches(opened.chain, opened.blocks)) if "gradient" in OBJECTIVES.get(recipe.objective).needs else 2
    return states * samples.units(0, len(samples)) * width * opened.loaded.residence.dtype.itemsize


def _groups(model: Any, targets: Targets, samples: Samples, task: Task) -> dict[str, str]:
    """Find which targets share an input, and whether the model runs on the samples at all."""
    batch = on_device(samples.small, model.device, model.dtype)
    try:
        return find_groups(model, targets.targets, lambda: task.call(model, batch))
    except TwofoldError as error:
        raise TwofoldError(f"{error}, so it can't be calibrated on it; {without_data()}") from error


def reuse(path: Path, mark: str, request: Request, *, named: bool) -> Moments | None:
    """Return the saved moments; None if there are none.

    Moments that are not whole are removed, to be collected again; where the user named the folder, they are refused.
    """
    if not (path / DESCRIPTION).is_file():
        return None
    try:
        moments = Moments.load(path, mark)
        for kind, _, name in (key.partition("/") for key in request.names() if key not in moments.sums):
            raise TwofoldError(f"the moments lack {kind} of {name}; delete them and run again")
        return moments
    except TwofoldError:
        if named:
            raise
        shutil.rmtree(path, ignore_errors=True)
        return None
