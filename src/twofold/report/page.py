"""report.html: one file, without scripts or requests, that shows what was done to a model and why."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from twofold.planning.plan import Plan
from twofold.report.formats import count, megabytes
from twofold.report.kinds import LossScale, SpectraValues, loss_of
from twofold.report.names import model_title, public_recipe, without_paths
from twofold.report.record import Run


def write_report(folder: Path, run: Run, plan: Plan, spectra: SpectraValues) -> None:
    """Write folder/report.html, where all that comes from a model or from data is escaped; the spectra may be empty."""
    here = files("twofold.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(here.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    style = Markup(here.joinpath("report.css").read_text(encoding="utf-8"))
    page = template.render(style=style, **_content(run, plan, spectra))
    (folder / "report.html").write_text(page, encoding="utf-8")


def _content(run: Run, plan: Plan, spectra: SpectraValues) -> dict[str, Any]:
    """Return what the template shows."""
    from twofold.report import tables, wording  # these and the figures import matplotlib

    loss = loss_of(plan)
    shown = public_recipe(run.recipe)
    return {
        "title": model_title(plan.model),
        "summary": wording.summary_text(run, plan),
        "sizes": tables.size_table(plan),
        "quality": None if run.quality is None else tables.quality_table(run, run.quality),
        "quality_text": wording.quality_text(run),
        "estimate": wording.estimate_text(run),
        "loss": loss,
        "figures": _figures(plan, spectra, loss),
        "check": wording.check_text(plan),
        "samples": run.samples,
        "reasons": wording.reasons_text(run, plan, spectra),
        "kind_reasons": wording.kind_reasons(run, plan, spectra),
        "kinds": tables.kind_table(plan, loss),
        "why": tables.reason_table(plan),
        "notes": [without_paths(note) for note in dict.fromkeys([*plan.notes, *run.notes])],
        "recipe": shown.to_yaml(),
        "shortened": shown != run.recipe,
        "facts": _facts(run),
        "times": tables.time_table(run),
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
