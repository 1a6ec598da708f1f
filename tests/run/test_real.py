"""The built-in model: one real run in every test, and all bars of the main job in ``make check-slow``."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import twofold.model.builtin
from conftest import DATA
from twofold.planning.plan import Plan
from twofold.recipe import make_recipe
from twofold.report.record import Run
from twofold.run.compress import compress
from twofold.task.causal_lm import CausalLM
from twofold.task.output.quality import measure_quality
from twofold.task.text.held_out import evaluation_windows

WIKITEXT = DATA / "wikitext-2-raw"
needs_data = pytest.mark.skipif(not WIKITEXT.is_dir(), reason="WikiText-2 is not at ../shared/data/wikitext-2-raw")
pytestmark = [pytest.mark.real, needs_data]


@pytest.mark.long
def test_a_real_run(tmp_path, monkeypatch):
    """Keep 0.8 from 4,096 tokens: smaller as planned, loads in plain transformers, close to the original."""
    recipe = make_recipe({
        "model": "smollm2", "keep": 0.8, "calibration": [str(WIKITEXT / "wiki.train.part.raw")], "tokens": 4096,
        "eval_windows": 0,
    })  # fmt: skip
    out = tmp_path / "small"
    run = compress(recipe, out, moments=tmp_path / "moments", quiet=True)
    plan = Plan.load(out / "plan.json")
    assert len(plan.entries) == 210 and plan.target_before == 106_168_320
    assert abs(plan.keep - 0.8) < 1e-4
    assert run.peak_memory < 4 * 2**30
    assert len(run.samples) == 2 and all(s.original for s in run.samples)
    for entry in plan.entries:
        if entry.rank:
            assert entry.measured_loss == pytest.approx(entry.predicted_loss, rel=1e-3)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    windows = evaluation_windows(WIKITEXT / "wiki.test.raw", tokenizer, windows=2)
    dense = AutoModelForCausalLM.from_pretrained(twofold.model.builtin.smollm2_folder())
    task = CausalLM()
    first, second = measure_quality(
        [lambda i, one=one: task.outputs(one, windows.batch(i, i + 1)) for one in (dense, model)],
        windows, task, quiet=True,
    )  # fmt: skip
    assert second.perplexity < 1.35 * first.perplexity
    # So few tokens fit their own noise: the estimate is below what is measured on another text.
    assert 0 < run.predicted_divergence < second.divergence < 0.6
    # The gauge form in float32 is the product that was planned.
    name = next(e.name for e in plan.entries if e.rank and e.kind == "down_proj")
    layer = model.get_submodule(name)
    x = torch.randn(4, layer.in_features)
    torch.testing.assert_close(layer(x), x @ layer.to_dense().T, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_all_bars_of_the_main_job(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    bench = importlib.import_module("main_job")
    bars = bench.main_job(tmp_path / "bench", WIKITEXT, windows=16)
    print(bench.markdown(bars, 16))
    check_prediction(tmp_path / "bench")
    assert all(bar.met for bar in bars), [bar for bar in bars if not bar.met]


def check_prediction(bench: Path) -> None:
    """A plan's divergence is of the size of what the test split measures, though too low.

    Not of the run's own four held-out windows: so few and short ones scatter, and are harder (docs/design.md, section 1).
    """
    predicted = Run.model_validate_json((bench / "run-0.8.json").read_text()).predicted_divergence
    measured = json.loads((bench / "eval-0.8.json").read_text())["models"][1]["divergence"]
    assert predicted is not None and predicted < measured < predicted * 2
