"""report.html: one file that makes no request and shows what was done to a model, or would be, and why.

All of it can be read without scripts; with them, a part of it plans anew (web/).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.host.files import write_text
from twofold.host.folders import check_place
from twofold.planning.plan import Plan
from twofold.recipe import Recipe
from twofold.report.explorer import embedded
from twofold.report.kinds import LossScale, SpectraValues, loss_of
from twofold.report.messages import ENGLISH, Words
from twofold.report.names import model_title, public_recipe, without_paths
from twofold.report.record import Run
from twofold.report.templates import inlined, render

GENERATOR = '<meta name="generator" content="Twofold">'


def check_page(path: Path, generator: str = GENERATOR) -> None:
    """Refuse a file that can't be written, or would take the place of something else than a page of ours.

    Args:
        generator: what the pages hold that it may take the place of.

    Raises:
        TwofoldError: if it is a folder, another file, or lies where no file can be made.
    """
    check_place(path)
    if path.is_dir():
        raise TwofoldError(f"{path} is a folder; name a file for the page, such as {path / 'plan.html'}")
    if path.exists() and generator.encode() not in path.read_bytes()[:4096]:
        raise TwofoldError(f"{path} exists and is no page of Twofold, so it is not replaced; name another file")


def write_report(
    folder: Path,
    run: Run,
    plan: Plan,
    spectra: SpectraValues,
    live: dict[str, Any] | None = None,
    words: Words | None = None,
) -> None:
    """Write folder/report.html.

    Args:
        spectra: those that are known; may be empty.
        live: what the page plans anew from, as ``explorer_data`` gives it; None for a page that does not.
        words: of the language of the page; English if it is None.
    """
    write_page(folder / "report.html", run.recipe, plan, spectra, live, run, words=words)


def write_page(
    path: Path,
    recipe: Recipe,
    plan: Plan,
    spectra: SpectraValues,
    live: dict[str, Any] | None = None,
    run: Run | None = None,
    *,
    words: Words | None = None,
) -> None:
    """Write the page of a run, or of a plan alone."""
    write_text(path, page_text(recipe, plan, spectra, live, run, words=words))


def page_text(
    recipe: Recipe,
    plan: Plan,
    spectra: SpectraValues,
    live: dict[str, Any] | None = None,
    run: Run | None = None,
    *,
    words: Words | None = None,
    server: Mapping[str, Any] | None = None,
) -> str:
    """Make the page of a run, or of a plan alone. All that comes from a model or from data is escaped.

    Args:
        server: what the page is told of the program that serves it, which it may then ask; None for a file.
    """
    scripted = live is not None or server is not None
    return render(
        "report.html.jinja",
        style=inlined("report.css", "web/explorer.css") if scripted else inlined("report.css"),
        script=inlined("web/explorer.js") if scripted else None,
        live=None if live is None else embedded(live),
        server=None if server is None else embedded(server),
        **_content(run, recipe, plan, spectra, words or ENGLISH),
    )


def _content(run: Run | None, recipe: Recipe, plan: Plan, spectra: SpectraValues, words: Words) -> dict[str, Any]:
    """Return what the template shows."""
    from twofold.report import tables, wording  # these and the figures import matplotlib

    loss = loss_of(plan, words)
    shown = public_recipe(recipe)
    quality, notes = (None, []) if run is None else (run.quality, run.notes)
    return {
        "say": words.say,
        "language": words.language,
        "title": words.say("page.title.plan" if run is None else "page.title", model=model_title(plan.model)),
        "planned": run is None,
        "summary": wording.summary_text(run, plan, words),
        "sizes": tables.size_table(plan, words),
        "quality": None if run is None or quality is None else tables.quality_table(run, quality, words),
        "quality_text": wording.quality_text(run, words),
        "estimate": wording.estimate_text(run, plan, words),
        "loss": loss,
        "figures": _figures(plan, spectra, loss, words),
        "check": wording.check_text(plan, words),
        "samples": [] if run is None else run.samples,
        "reasons": wording.reasons_text(recipe, plan, spectra, words),
        "kind_reasons": wording.kind_reasons(recipe, plan, spectra, words),
        "kinds": tables.kind_table(plan, loss, words),
        "why": tables.reason_table(plan, words),
        "notes": [without_paths(note) for note in dict.fromkeys([*plan.notes, *notes])],
        "recipe": shown.to_yaml(),
        "shortened": shown != recipe,
        "facts": None if run is None else _facts(run, words),
        "times": None if run is None else tables.time_table(run, words),
        "weights": tables.weight_table(plan, loss, words),
    }


def _figures(plan: Plan, spectra: SpectraValues, loss: LossScale, words: Words) -> dict[str, Any]:
    """Draw the figures that this plan has data for."""
    from twofold.report.bars import loss_by_kind, loss_by_layer, size_bars
    from twofold.report.drawing import depth_colour, gradient, share_colour
    from twofold.report.heatmap import rank_heatmap
    from twofold.report.scatter import compared, loss_scatter
    from twofold.report.spectra import spectra_panels

    lossy = loss.known and any(entry.predicted_loss for entry in plan.entries)
    return {
        "depth": gradient(depth_colour),
        "share": gradient(share_colour),
        "heatmap": rank_heatmap(plan, words) if plan.entries else None,
        "spectra": spectra_panels(plan, spectra, loss, words),
        "sizes": size_bars(plan, words) if plan.entries or plan.dense else None,
        "scatter": loss_scatter(plan, loss, words) if compared(plan) else None,
        "by_kind": loss_by_kind(plan, loss, words) if lossy else None,
        "by_layer": loss_by_layer(plan, loss, words) if lossy else None,
    }


def _facts(run: Run, words: Words) -> list[tuple[str, str]]:
    """Say where, with what and on what the run was made."""
    m, tokens = run.machine, run.unit == "tokens"
    where = {"system": m.system, "device": m.device, "threads": m.threads, "dtype": m.dtype}
    memory = words.megabytes(run.peak_memory) if run.peak_memory else words.say("fact.unmeasured")
    facts = [
        ("Twofold", m.twofold),
        ("Python, torch, transformers", f"{m.python}, {m.torch}, {m.transformers}"),
        (words.say("fact.machine"), words.say("fact.machine.words", **where)),
        (words.say("fact.memory"), memory),
        (words.say("fact.seed"), str(run.recipe.seed)),
        (words.say("fact.text" if tokens else "fact.data"), without_paths(run.calibration)),
        (words.say("fact.units", unit=words.told(run.unit)), words.count(run.calibration_tokens)),
    ]
    if run.calibration_sha256:
        what = words.say("fact.ids") if tokens else words.told(run.unit)
        facts.append((words.say("fact.sha", what=what), run.calibration_sha256))
    if run.fingerprint:
        origin = "fact.again" if run.moments_reused else "fact.collected"
        facts.append((words.say("fact.moments"), words.say(origin, fingerprint=run.fingerprint)))
    return facts
