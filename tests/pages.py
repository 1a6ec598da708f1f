"""Plans and runs made up for the report and the card, and what a reader finds in what is written of them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from twofold.host.clock import Machine
from twofold.linalg.gauge import gauge_storage
from twofold.planning.plan import DenseEntry, Plan, PlanEntry
from twofold.recipe import Recipe
from twofold.report.page import write_report
from twofold.report.record import Measured, Run, Sample

KINDS = {"q_proj": (16, 16), "v_proj": (8, 16), "up_proj": (48, 16), "down_proj": (16, 48)}
VOID = {"meta", "br", "hr", "img", "link", "input"}


def spectrum(k: int, seed: int) -> np.ndarray:
    """Return σ² (k,), largest first."""
    return np.sort(np.random.default_rng(seed).uniform(1e-6, 1e-2, k))[::-1] ** 2


def make_plan(
    *,
    model: str = "smollm2",
    names: list[tuple[str, int | None]] | None = None,  # (name, layer)
    unit: str = "nats",
    losses: bool = True,
    dense: bool = False,
    **settings: Any,
) -> tuple[Plan, dict[str, np.ndarray]]:
    """Return a plan with half of the rank of each weight, and its spectra."""
    if names is None:
        names = [(f"model.layers.{i}.block.{kind}", i) for i in range(3) for kind in KINDS]
    entries, spectra = [], {}
    for i, (name, layer) in enumerate(names):
        kind = name.rpartition(".")[2]
        m, n = KINDS.get(kind, (16, 24))
        values = spectrum(min(m, n), i)
        rank = None if dense else min(m, n) // 2 - i % 3
        lost = 0.0 if rank is None else float(values[rank:].sum())
        spectra[name] = values
        entries.append(
            PlanEntry(
                name=name, kind=kind, layer=layer, out_features=m, in_features=n, group=name, rank=rank,
                form=None if dense else "rows", transposed=False, bias=False, numbers_before=m * n,
                numbers_after=m * n if rank is None else gauge_storage(m, n, rank),
                predicted_loss=lost if losses else None, total_loss=float(values.sum()) if losses else None,
                measured_loss=lost * (1 + 1e-6) if losses and rank is not None else None,
                reason="dense: an override says so" if dense else "global allocation",
            )
        )  # fmt: skip
    left = [DenseEntry(name="embed.weight", shape=[100, 16], numbers=1600, reason="embedding: left dense for now")]
    made: dict[str, Any] = {"objective": "two-sided", "allocate": "global", "element_bytes": 4, "notes": [], **settings}
    return Plan(model=model, loss_unit=unit, entries=entries, dense=left, **made), spectra if losses else {}


def make_run(plan: Plan, *, quality: bool = True, samples: list[Sample] | None = None, **recipe: Any) -> Run:
    """Return a run of a plan, with figures made up."""
    settings = {"model": plan.model, "keep": 0.5, "calibration": ["/home/someone/texts/wiki.train.raw"], **recipe}
    measured = {"perplexity": 22.876, "loss": 3.13, "tokens": 4088, "divergence": None, "agreement": None}
    return Run(
        recipe=Recipe.model_validate(settings),
        machine=Machine(python="3.11.7", torch="2.13.0", transformers="5.23.0", threads=2),
        calibration="wiki.train.raw", calibration_tokens=65536, calibration_sha256="ab" * 32, fingerprint="cd" * 32,
        moments_reused=False, predicted_divergence=plan.predicted_divergence,
        quality=Measured(
            text="held-out wiki.train.raw", windows=8, window=512, original=measured,
            factored={**measured, "perplexity": 26.213, "divergence": 0.1234, "agreement": 0.789},
        ) if quality else None,
        samples=[Sample(prompt="Name a sea.", original="The Baltic.", factored="")] if samples is None else samples,
        seconds={"load": 2.0, "calibrate": 14.5}, peak_memory=3_000_000_000,
        keep=plan.keep if plan.entries else 1.0, keep_model=plan.keep_model,
        parameters_before=plan.model_before, parameters_after=plan.model_after,
        target_before=plan.target_before, target_after=plan.target_after,
        bytes_before=plan.bytes_before, bytes_after=plan.bytes_after,
    )  # fmt: skip


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def page(folder: Path, run: Run, plan: Plan, spectra: dict[str, np.ndarray]) -> Page:
    """Write the report and read it; whatever it is made of, it is whole and loads nothing."""
    write_report(folder, run, plan, spectra)
    text = (folder / "report.html").read_text(encoding="utf-8")
    read = Page(text)
    assert read.open == []
    for tag, attributes in read.tags:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "srcset", "data"}:
                assert (value or "").startswith("#")
    assert "@import" not in text
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", text))
    return read


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the YAML and the Markdown of a card."""
    _, matter, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(matter), body
