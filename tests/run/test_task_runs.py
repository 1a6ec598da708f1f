"""Runs of models that do not predict the next token: what is measured, told and refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import tiny
import twofold
from clips import image_bytes, picture, put
from pages import front_matter
from twofold.cli.compare import print_comparison
from twofold.cli.compress import print_run
from twofold.comparison.record import Comparison
from twofold.planning.plan import Plan
from twofold.report.record import Run

SMALL = {"samples": 8, "eval_windows": 1, "quiet": True}


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT on disk."""
    folder = tmp_path_factory.mktemp("vit")
    tiny.vit().save_pretrained(folder)
    tiny.viewer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two of its classes."""
    files = {f"LABEL_{i % 2}/{i}.png": image_bytes(image=picture(seed=i)) for i in range(24)}
    return put(tmp_path_factory.mktemp("images"), files)


@pytest.mark.long
def test_a_run_tells_the_measures_of_its_task(viewer, images, tmp_path, capsys):
    run = twofold.compress(str(viewer), tmp_path / "out", keep=0.6, calibration=str(images), **SMALL)
    q = run.quality
    assert (q.prediction, q.agreement, q.size) == ("prediction", "same prediction", "8 images")
    assert q.original["perplexity"] is None and q.original["loss"] > 0 and q.factored["divergence"] > 0
    assert [len(q.scores["accuracy"]), run.unit, run.calibration_tokens] == [2, "images", 8]
    assert Run.model_validate_json((tmp_path / "out" / "run.json").read_text()).quality == q
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert plan.prediction == "prediction"
    print_run(run, plan, tmp_path / "out")
    card = front_matter(tmp_path / "out")[1]
    for told in (capsys.readouterr().out, card, (tmp_path / "out" / "report.html").read_text()):
        assert "accuracy" in told and "same prediction" in told and "nats per prediction" in told and "8 images" in told
        assert "perplexity" not in told and "per token" not in told and "windows of" not in told


@pytest.mark.long
def test_a_divergence_is_met_and_a_perplexity_refused(viewer, images):
    how = {"calibration": str(images), **SMALL}
    small = twofold.factorize(str(viewer), kl_at_most=0.05, **how)
    note = next(note for note in small.twofold_plan.notes if "the size was searched for" in note)
    assert "a divergence of at most 0.05 nats per prediction" in note and "8 images" in note
    assert any(
        "met" in note and "perplexity" not in note for note in small.twofold_plan.notes if "in the search" in note
    )
    for setting in ("25", "1.1x"):
        with pytest.raises(
            twofold.TwofoldError,
            match=f"`perplexity_at_most={setting}` goes by the perplexity, which the task image-classification does not "
            "have; give `kl_at_most`, `keep` or `budget`",
        ):
            twofold.factorize(str(viewer), perplexity_at_most=setting, **how)


def test_what_goes_by_the_next_token_is_refused(viewer, images):
    with pytest.raises(
        twofold.TwofoldError, match=r"`allocate=zero-sum` .* which the task image-classification is not about"
    ):
        twofold.factorize(str(viewer), keep=0.6, allocate="zero-sum", calibration=str(images), **SMALL)


@pytest.mark.whole
@pytest.mark.long
def test_a_comparison_goes_by_the_divergence(viewer, images, tmp_path, capsys):
    other = put(tmp_path / "other", {f"{i}.png": image_bytes(image=picture(seed=100 + i)) for i in range(3)})
    settings: dict[str, Any] = {"objectives": ["two-sided"], "keep": [0.8, 0.5], "refine": ["none", "distill"]}
    settings |= {"calibration": [str(images)], "eval_text": str(images), "other_text": [str(other)], "refine_steps": 2}
    out = tmp_path / "arena"
    made = twofold.compare(str(viewer), out, baselines=[], **settings, **SMALL)
    assert [made.measures(i) for i in (0, 1)] == [["divergence", "accuracy"], ["divergence"]] and [
        text.size for text in made.texts
    ] == [
        "8 images",
        "3 images",
    ]
    dense, *rows = made.measured
    assert dense.divergences == [0, 0] and len(rows) == 4
    assert all(row.divergence == row.divergences[0] > 0 and not row.perplexity for row in rows)
    assert made.front(0)[-1] is dense
    with (out / "compare.csv").open(newline="") as file:
        assert [float(line[f"divergence {made.texts[1].words}"]) for line in csv.DictReader(file)] == [
            row.divergences[1] for row in made.rows
        ]
    assert Comparison.model_validate_json((out / "compare.json").read_text()) == made
    print_comparison(made, out)
    for told in (capsys.readouterr().out, (out / "compare.md").read_text(), (out / "compare.svg").read_text()):
        assert "nats per prediction" in told and "perplexity" not in told.lower()
