"""The plan of a model, without a change to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twofold.calibrate.opened import Opened
from twofold.errors import TwofoldError
from twofold.evidence.beside import measure_beside
from twofold.factor.prepared import Prepared
from twofold.host.clock import Stopwatch
from twofold.host.folders import check_place
from twofold.model.load import load_skeleton
from twofold.objectives import OBJECTIVES
from twofold.planning.plan import Plan
from twofold.recipe import Recipe, make_recipe
from twofold.report.messages import Words
from twofold.run.check import check_methods
from twofold.run.estimate.estimate import estimate_run
from twofold.run.open import open_for
from twofold.run.prepare import layer_times, plan_of_shapes, prepare, targets_for
from twofold.run.sizing import Sizing
from twofold.settings.base import from_call


def plan(
    recipe: Recipe | Mapping[str, Any] | str,
    *,
    moments: Path | str | None = None,
    out: Path | str | None = None,
    html: Path | str | None = None,
    lang: str = "en",
    estimate: bool = True,
    quiet: bool = False,
    **settings: Any,
) -> Plan:
    """Make the plan of a recipe, and carry it out on nothing.

    If the recipe names a calibration, the plan is the one that ``compress`` makes, and the moments are kept for it. If it
    leaves the calibration to its default, no weight is read: the ranks are uniform, a note says so, and the memory and time that
    a run will take are estimated, the time from a probe of some seconds. A quality that is asked for is measured, so it needs
    a named calibration.

    >>> twofold.plan("smollm2", keep=0.8).keep_model    # doctest: +SKIP

    Args:
        recipe: a recipe, its settings, or the name of the model.
        moments: the folder of the moments; by default one in the cache.
        out: a file to write the plan to, as JSON.
        html: a file to write the plan to as a page, which plans anew for other sizes where the plan is by moments.
        lang: the language of the page, ``en`` or ``es``.
        estimate: whether the memory and time of a run are estimated too, where no weight is read.
        settings: any fields of ``twofold.Recipe``, where the model is named.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
    recipe = from_call(Recipe, make_recipe, recipe, settings)
    words = Words(lang)
    out, html = (None if path is None else Path(path).expanduser() for path in (out, html))
    if out is not None:
        _check_file(out)
    if html is not None:
        from twofold.report.page import check_page

        check_page(html)
    check_methods(recipe)
    named = "calibration" in recipe.model_fields_set or moments is not None
    prepared = None
    if named or not OBJECTIVES.get(recipe.objective).needs:
        prepared = _by_moments(recipe, None if moments is None else Path(moments).expanduser(), quiet=quiet)
        planned = prepared.plan
    else:
        planned = _by_shapes(recipe, estimate=estimate, quiet=quiet)
    if out is not None:
        planned.save(out)
    if html is not None:
        _write_page(html, recipe, planned, prepared, words)
    return planned


def _write_page(html: Path, recipe: Recipe, planned: Plan, prepared: Prepared | None, words: Words) -> None:
    """Write the page of a plan; it plans anew if there are moments."""
    from twofold.report.explorer import explorer_data
    from twofold.report.page import write_page

    if prepared is None:
        write_page(html, recipe, planned, {}, words=words)
        return
    parts = (prepared.loaded.residence, prepared.targets, prepared.decomposition)
    live = explorer_data(prepared.request(recipe), planned, recipe, measure_beside(*parts, recipe))
    write_page(html, recipe, planned, prepared.spectra.values, live, words=words)


def _check_file(out: Path) -> None:
    """Refuse a file that can't be written, or would take the place of something else than a plan.

    Raises:
        TwofoldError: if it is a folder, another file, or lies where no file can be made.
    """
    check_place(out)
    if out.is_dir():
        raise TwofoldError(f"{out} is a folder; name a file for the plan, such as {out / 'plan.json'}")
    if out.exists():
        try:
            Plan.load(out)
        except TwofoldError as error:
            raise TwofoldError(f"{out} exists and is no plan, so it is not replaced; name another file") from error


def _by_shapes(recipe: Recipe, *, estimate: bool, quiet: bool) -> Plan:
    """Plan by the shapes of the weights alone."""
    if recipe.bits == "auto":
        raise TwofoldError(
            "`bits=auto` measures what rounding loses: name `calibration=FILE`, or `calibration=self`; or give a number "
            "of bits"
        )
    if recipe.goal is not None:
        raise TwofoldError(
            f"{recipe.goal.setting} needs measuring: name `calibration=FILE`, or `calibration=self`; or give `keep` or `budget`"
        )
    how = recipe.model_dump(include={"revision", "trust_remote_code", "dequantize"})
    loaded = load_skeleton(recipe.model, **how)
    opened = Opened(loaded, named=recipe.task)
    recipe = opened.fitted(recipe, quiet=True)
    targets = targets_for(opened, recipe)
    uniform = plan_of_shapes(loaded, targets, recipe, layer_times(loaded, targets, recipe, quiet=quiet))
    note = (
        f"no calibration was named, so no weight was read, no loss is predicted and the ranks are uniform; "
        f"the {recipe.allocate} plan needs the moments: name `calibration=FILE`, or `calibration=self`"
    )
    estimated, notes = None, [*uniform.notes, note, *loaded.notes]
    try:
        estimated = estimate_run(opened, recipe, uniform.bytes_after) if estimate else None
    except TwofoldError as error:
        if recipe.memory is not None:
            raise
        notes.append(f"no run on this machine: {error}")  # the plan itself may be for another one
    if estimated is not None and opened.task is not None and not opened.task.streams:
        notes.append(f"the time to run the model on its {opened.task.name} samples is not estimated")
    return uniform.model_copy(update={"notes": notes, "estimate": estimated})


def _by_moments(recipe: Recipe, moments: Path | None, *, quiet: bool) -> Prepared:
    """Plan by the moments of a calibration, which are kept."""
    opened = open_for(recipe, quiet=quiet)
    recipe = opened.fitted(recipe, quiet=quiet)
    sizing = Sizing(opened, recipe, quiet=quiet) if recipe.goal is not None else None
    watch = Stopwatch()
    return prepare(recipe, opened, watch, moments_folder=moments, bases=False, sizing=sizing, quiet=quiet)
