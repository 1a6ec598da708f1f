"""The record of a fine-tuning, kept as run.json; and its curve and card."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any, Literal

import pydantic
from huggingface_hub import ModelCardData
from matplotlib.figure import Figure

from twofold.checkpoint.beside import Licence
from twofold.host.clock import Machine
from twofold.report.card import files_and_licence
from twofold.report.printed import COLOURS, on_paper
from twofold.report.record import Sample
from twofold.tuning.settings import TuneSettings


class Point(pydantic.BaseModel, extra="forbid"):
    """A loss at a step, in nats a token."""

    step: int
    loss: float


class TuneRun(pydantic.BaseModel, extra="forbid"):
    """A whole fine-tuning."""

    kind: Literal["tune"] = "tune"
    settings: TuneSettings
    machine: Machine
    base_sha256: str  # of the base model's weights; empty where it has no safetensors
    data_sha256: str  # of the tokens and labels
    rows: int  # trained on
    rows_held_out: int
    rows_skipped: int = 0
    rows_cut: int = 0
    rows_too_long: int = 0  # left out
    windows: int  # rows, or packed windows
    tokens: int  # of the rows that are trained on
    tokens_learnt: int
    trainable: int  # numbers that are trained
    parameters: int
    steps: int
    steps_planned: int
    resumed: int = 0  # the step that the run was taken up at, the last time
    held_out_before: float | None = None  # nats a token
    held_out_after: float | None = None
    curve: list[Point] = []
    held_out_curve: list[Point] = []
    samples: list[Sample] = []
    steps_shortened: int = 0  # factors: layer steps that the bound shortened
    seconds: dict[str, float] = {}
    step_seconds: float = 0.0  # of this process, without the looks at the held-out rows
    peak_memory: int = 0  # bytes, resident
    estimated_memory: int = 0
    notes: list[str] = []
    carried: list[str] = []  # files of the base model that stand beside the weights as they were
    licence: Licence = {}  # of the base model: what its card says, or the file that holds it


def draw_curve(run: TuneRun, path: Path) -> None:
    """Draw the training loss of each step and the held-out loss over the steps, as an SVG."""
    with on_paper("twofold"):
        figure = Figure(figsize=(7.0, 4.0), layout="constrained")
        axes: Any = figure.subplots()
        axes.grid(True, alpha=0.6)
        training = {"color": COLOURS[5], "linewidth": 1.0, "label": "training rows, each step"}
        held_out = {"color": COLOURS[1], "linewidth": 1.6, "label": "held-out rows", "marker": "o", "markersize": 4}
        for curve, style in ((run.curve, training), (run.held_out_curve, held_out)):
            if curve:
                axes.plot([point.step for point in curve], [point.loss for point in curve], **style)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a token)")
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def write_card(run: TuneRun, folder: Path) -> None:
    """Write the README.md of what was trained."""
    s = run.settings
    rows = [
        ("base model", _plain(s.model)),
        ("method", s.method if s.method in ("full", "factors") else f"{s.method}, rank {s.size}"),
        ("trained numbers", f"{run.trainable:,} of {run.parameters:,}"),
        ("rows", f"{run.rows:,} trained on, {run.rows_held_out:,} held out"),
        ("steps", f"{run.steps:,} of {s.batch} rows or windows, highest rate {s.rate:g}, cosine"),
        ("held-out loss before", _loss(run.held_out_before)),
        ("held-out loss after", _loss(run.held_out_after)),
    ]
    library = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    data = ModelCardData(library_name=library, tags=["twofold"], **run.licence)  # type: ignore[arg-type]
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        "# Fine-tuned with Twofold",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]),
        f"The loss is in nats a token, over {'the answers' if s.loss == 'answers' else 'all tokens'}.",
        "![Loss over the steps](loss.svg)",
    ]
    for sample in run.samples:
        parts.append(f"**{_plain(sample.prompt)}**")
        parts.append(f"- before: {_plain(sample.original)}\n- after: {_plain(sample.factored)}")
    if run.notes:
        parts += ["## Notes", "\n".join(f"- {_plain(note)}" for note in run.notes)]
    parts += files_and_licence(run.carried, run.licence)
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _plain(text: str) -> str:
    """Return text from a model or a user as Markdown that means nothing but itself."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
