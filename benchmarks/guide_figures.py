"""The figures of docs/guides: spectra of real weights in three metrics, and the ranks of a plan.

    twofold plan smollm2 --keep 0.8 --calibration self --tokens 4096 --seed 0 --moments moments/
    python benchmarks/guide_figures.py --moments moments/

It writes SVGs in both languages to docs/guides/figures, and prints the figures that the guides cite.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from twofold.report.formats import power_of_ten

ROOT = Path(__file__).resolve().parents[1]
METRICS = {"svd": "#b8442f", "svd-llm": "#8a8d91", "two-sided": "#1f6fb2"}
STYLES = {"svd": "--", "svd-llm": "-.", "two-sided": "-"}
MARKS = {"svd": "o", "svd-llm": "s", "two-sided": "D"}
ENERGY = 0.99
WORDS: dict[str, dict[str, str]] = {
    "en": {
        "svd": "plain", "svd-llm": "in the metric of its inputs", "two-sided": "in both metrics", "value": "σ² / Σσ²",
        "component": "component", "rank": "rank kept", "left": "share of Σσ² left out", "layer": "layer",
        "needed": "rank that holds {energy:.0%} of Σσ², over full rank", "kind": "kind", "kept": "parameters kept",
    },
    "es": {
        "svd": "simple", "svd-llm": "en la métrica de las entradas", "two-sided": "en ambas métricas", "value": "σ² / Σσ²",
        "component": "componente", "rank": "rango conservado", "left": "parte de Σσ² que se omite", "layer": "capa",
        "needed": "rango que reúne el {energy:.0%} de Σσ², sobre el rango completo", "kind": "tipo",
        "kept": "parámetros conservados",
    },
}  # fmt: skip
STYLE = {
    "axes.spines.right": False, "axes.spines.top": False, "axes.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "font.family": ["DejaVu Sans"], "font.size": 10, "svg.fonttype": "none",
    "legend.frameon": False, "text.parse_math": False, "figure.facecolor": "white",
}  # fmt: skip
Values = dict[str, Any]  # name of a weight → σ² (k,), largest first


def spectra_and_plan(given: argparse.Namespace) -> tuple[dict[str, Values], Any]:
    """Decompose every weight in three metrics, and plan from the last of them."""
    from twofold.calibrate.moments import Moments
    from twofold.decompose.decompose import Decomposition, decompose_targets
    from twofold.decompose.spectra import Spectra
    from twofold.model.load import load_model, targets_of
    from twofold.objectives import OBJECTIVES
    from twofold.planning.make import make_plan
    from twofold.recipe import make_recipe

    loaded = load_model(given.model)
    targets, moments = targets_of(loaded), Moments.load(given.moments)
    recipe = make_recipe({"model": given.model, "keep": given.keep})
    spectra = {}
    for name in METRICS:
        found = Decomposition(moments, OBJECTIVES.get(name), recipe.damping, Spectra(bases=False))
        decompose_targets(loaded.residence, targets, found)
        spectra[name] = found.spectra.values
    return spectra, make_plan(loaded.name, targets, spectra["two-sided"], recipe, loaded.stored_dtype.itemsize)


def rank_for(values: Any, energy: float = ENERGY) -> int:
    """Return the smallest rank that holds a share of Σσ²."""
    return int(np.searchsorted(np.cumsum(values), energy * values.sum()) + 1)


def draw_spectrum(spectra: Mapping[str, Values], weight: str, words: Mapping[str, str]) -> Figure:
    """Draw one weight: its spectrum, and what each rank leaves out of it."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    one, other = figure.subplots(1, 2)
    for metric, colour in METRICS.items():
        shares = spectra[metric][weight] / spectra[metric][weight].sum()
        line = {"color": colour, "linestyle": STYLES[metric], "linewidth": 1.6, "label": words[metric]}
        one.plot(np.arange(1, len(shares) + 1)[::4], shares[::4], **line)
        other.plot(np.arange(len(shares) + 1)[::4], np.append(1 - np.cumsum([0, *shares[:-1]]), 0)[::4], **line)
    one.set(yscale="log", ylim=(1e-6, 1), xlabel=words["component"], ylabel=words["value"])
    other.set(ylim=(0, 1), xlabel=words["rank"], ylabel=words["left"])
    one.set_yticks([10.0**-i for i in range(7)], [power_of_ten(-i) for i in range(7)], minor=False)
    one.yaxis.set_minor_locator(NullLocator())
    one.legend(loc="upper right")
    return figure


def draw_needed(spectra: Mapping[str, Values], plan: Any, words: Mapping[str, str]) -> Figure:
    """Draw for every weight the rank that it needs, in three metrics."""
    kinds = list(dict.fromkeys(entry.kind for entry in plan.entries))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for row, (metric, colour) in enumerate(METRICS.items()):
        at, ranks = [], []
        for entry in plan.entries:
            values = spectra[metric][entry.name]
            at.append(kinds.index(entry.kind) + 0.22 * (row - 1))
            ranks.append(rank_for(values) / len(values))
        axes.scatter(ranks, at, s=10, marker=MARKS[metric], color=colour, alpha=0.6, linewidths=0, label=words[metric])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlim=(0, 1.01), ylim=(len(kinds) - 0.5, -0.5), xlabel=words["needed"].format(energy=ENERGY))
    figure.legend(loc="outside upper left", ncols=3, markerscale=1.6)
    return figure


def draw_ranks(plan: Any, words: Mapping[str, str]) -> Figure:
    """Draw the ranks of a plan: a row for each kind, a column for each layer; = is dense."""
    kinds = list(dict.fromkeys(entry.kind for entry in plan.entries))
    layers = sorted({entry.layer for entry in plan.entries})
    shares = np.full((len(kinds), len(layers)), np.nan)
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots()
    for entry in plan.entries:
        row, column = kinds.index(entry.kind), layers.index(entry.layer)
        shares[row, column] = entry.numbers_after / entry.numbers_before
        axes.text(
            column + 0.5, row + 0.5, "=" if entry.rank is None else str(entry.rank), ha="center", va="center",
            fontsize=8, color="black" if shares[row, column] > 0.55 else "white",
        )  # fmt: skip
    mesh = axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
    figure.colorbar(mesh, ax=axes, label=words["kept"], pad=0.01)
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    axes.set_xticks(np.arange(len(layers)) + 0.5, layers)
    axes.set(xlabel=words["layer"], ylim=(len(kinds), 0))
    axes.grid(False)
    return figure


def small_svg(figure: Figure) -> str:
    """Return a figure as SVG without comments, metadata, groups' names and indentation."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", buffer.getvalue(), flags=re.S)
    text = re.sub(r' transform="rotate\(-0 [^"]*"|(?<=<g) id="(?!figure)[^"]*"', "", text)
    return re.sub(r"\n\s*", "\n", text)


def cited(spectra: Mapping[str, Values], plan: Any, weight: str) -> dict[str, Any]:
    """Return the figures that the guides cite."""
    kinds = list(dict.fromkeys(entry.kind for entry in plan.entries))
    shares = {m: {n: rank_for(v) / len(v) for n, v in values.items()} for m, values in spectra.items()}
    ranked = [(entry.rank, entry.name) for entry in plan.entries if entry.rank is not None]
    return {
        "weight": {m: {"rank for 99%": rank_for(v[weight]), "first of Σσ²": float(v[weight][0] / v[weight].sum()),
                       "left out at a quarter": float(v[weight][len(v[weight]) // 4 :].sum() / v[weight].sum())}
                   for m, v in spectra.items()},
        "mean share of full rank for 99%": {
            m: {k: round(float(np.mean([shares[m][e.name] for e in plan.entries if e.kind == k])), 3) for k in kinds}
            | {"all": round(float(np.mean(list(shares[m].values()))), 3)}
            for m in spectra
        },
        "plan": {"keep": plan.keep, "dense": len(plan.entries) - len(ranked), "smallest": min(ranked), "largest": max(ranked),
                 "predicted divergence": plan.predicted_divergence},
        "mean kept by kind": {
            k: round(float(np.mean([e.numbers_after / e.numbers_before for e in plan.entries if e.kind == k])), 3)
            for k in kinds
        },
    }  # fmt: skip


def main() -> None:
    """Draw all figures in both languages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--moments", type=Path, required=True, help="the folder that `twofold plan --moments` wrote")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--weight", default="model.layers.15.mlp.up_proj", help="the one whose spectrum is drawn")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "guides" / "figures")
    given = parser.parse_args()
    spectra, plan = spectra_and_plan(given)
    given.out.mkdir(parents=True, exist_ok=True)
    for language, words in WORDS.items():
        figures = {
            "spectrum": draw_spectrum(spectra, given.weight, words),
            "needed": draw_needed(spectra, plan, words),
            "ranks": draw_ranks(plan, words),
        }
        for name, figure in figures.items():
            (given.out / f"{name}.{language}.svg").write_text(small_svg(figure), encoding="utf-8")
    print(json.dumps(cited(spectra, plan, given.weight), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    matplotlib.rcParams.update(STYLE | {"svg.hashsalt": "guides"})
    main()
