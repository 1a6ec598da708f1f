"""report.html: one file that makes no request and shows what was done to a model, or would be, and why.

All of it can be read without scripts; with them, a part of it plans anew (web/).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from twofold.host.files import write_text
from twofold.planning.plan import Plan
from twofold.recipe import Recipe
from twofold.report.explorer import embedded
from twofold.report.formats import count, megabytes
from twofold.report.kinds import LossScale, SpectraValues, loss_of
from twofold.report.names import model_title, public_recipe, without_paths
from twofold.report.record import Run


def write_report(
    folder: Path, run: Run, plan: Plan, spectra: SpectraValues, live: dict[str, Any] | None = None
) -> None:
    """Write folder/report.html.

    Args:
        spectra: those that are known; may be empty.
        live: what the page plans anew from, as ``explorer_data`` gives it; None for a page that does not.
    """
    write_page(folder / "report.html", run.recipe, plan, spectra, live, run)


def write_page(
    path: Path,
    recipe: Recipe,
    plan: Plan,
    spectra: SpectraValues,
    live: dict[str, Any] | None = None,
    run: Run | None = None,
) -> None:
    """Write the page of a run, or of a plan alone."""
    write_text(path, page_text(recipe, plan, spectra, live, run))


def page_text(
    recipe: Recipe,
    plan: Plan,
    spectra: SpectraValues,
    live: dict[str, Any] | None = None,
    run: Run | None = None,
    server: Mapping[str, Any] | None = None,
) -> str:
    """Make the page of a run, or of a plan alone. All that comes from a model or from data is escaped.

    Args:
        server: what the page is told of the program that serves it, which it may then ask; None for a file.
    """
    here = files("twofold.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(here.joinpath("report.html.jinja").read_text(encoding="utf-8"))

    def read(*names: str) -> Markup:
        return Markup("\n".join(here.joinpath(name).read_text(encoding="utf-8") for name in names))

    scripted = live is not None or server is not None
    return template.render(
        style=read("report.css", "web/explorer.css") if scripted else read("report.css"),
        script=read("web/explorer.js") if scripted else None,
        live=None if live is None else embedded(live),
        server=None if server is None else embedded(server),
        **_content(run, recipe, plan, spectra),
    )


def _content(run: Run | None, recipe: Recipe, plan: Plan, spectra: SpectraValues) -> dict[str, Any]:
    """Return what the template shows."""
    from twofold.report import tables, wording  # these and the figures import matplotlib

    loss = loss_of(plan)
    shown = public_recipe(recipe)
    quality, notes = (None, []) if run is None else (run.quality, run.notes)
    return {
        "title": model_title(plan.model),
        "planned": run is None,
        "summary": wording.summary_text(run, plan),
        "sizes": tables.size_table(plan),
        "quality": None if run is None or quality is None else tables.quality_table(run, quality),
        "quality_text": wording.quality_text(run),
        "estimate": wording.estimate_text(run, plan),
        "loss": loss,
        "figures": _figures(plan, spectra, loss),
        "check": wording.check_text(plan),
        "samples": [] if run is None else run.samples,
        "reasons": wording.reasons_text(recipe, plan, spectra),
        "kind_reasons": wording.kind_reasons(recipe, plan, spectra),
        "kinds": tables.kind_table(plan, loss),
        "why": tables.reason_table(plan),
        "notes": [without_paths(note) for note in dict.fromkeys([*plan.notes, *notes])],
        "recipe": shown.to_yaml(),
        "shortened": shown != recipe,
        "facts": None if run is None else _facts(run),
        "times": None if run is None else tables.time_table(run),
        "weights": tables.weight_table(plan, loss),
    }


def _figures(plan: Plan, spectra: SpectraValues, loss: LossScale) -> dict[str, Any]:
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
        "heatmap": rank_heatmap(plan) if plan.entries else None,
        "spectra": spectra_panels(plan, spectra, loss),
        "sizes": size_bars(plan) if plan.entries or plan.dense else None,
        "scatter": loss_scatter(plan, loss) if compared(plan) else None,
        "by_kind": loss_by_kind(plan, loss) if lossy else None,
        "by_layer": loss_by_layer(plan, loss) if lossy else None,
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    """Say where, with what and on what the run was made."""
    m = run.machine
    facts = [
        ("Twofold", m.twofold),
        ("Python, torch, transformers", f"{m.python}, {m.torch}, {m.transformers}"),
        ("machine", f"{m.system}, {m.device}, {m.threads} threads, computed in {m.dtype}"),
        ("peak memory", megabytes(run.peak_memory) if run.peak_memory else "not measured"),
        ("seed", str(run.recipe.seed)),
        ("calibration text" if run.unit == "tokens" else "calibration data", without_paths(run.calibration)),
        (f"calibration {run.unit}", count(run.calibration_tokens)),
    ]
    if run.calibration_sha256:
        facts.append((f"SHA-256 of the {'token ids' if run.unit == 'tokens' else run.unit}", run.calibration_sha256))
    if run.fingerprint:
        origin = "used again from an earlier run" if run.moments_reused else "collected in this run"
        facts.append(("moments", f"{run.fingerprint}, {origin}"))
    return facts
