"""The report and the card, on plans and runs that are made up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from pages import KINDS, front_matter, make_plan, make_run, page
from twofold.report.card import write_card
from twofold.report.formats import megabytes, number, percent
from twofold.report.kinds import by_kind, kind_labels, loss_at_share
from twofold.report.names import base_model, public_name, without_paths
from twofold.report.record import Run, Sample

pytestmark = pytest.mark.whole
ATTACK = "<script>alert(1)</script>"


@pytest.mark.long
def test_the_page_shows_the_numbers_of_the_plan(tmp_path: Path) -> None:
    plan, spectra = make_plan()
    run = make_run(plan)
    read = page(tmp_path, run, plan, spectra)
    for words in (
        percent(plan.keep, 2), percent(plan.keep_model, 2), megabytes(plan.bytes_before), megabytes(plan.bytes_after),
        "22.88", "26.21", "1.15", "0.123", "78.9", number(plan.predicted_divergence), "65,536", "ab" * 32, "14.5",
        "3.0", "SmolLM2-135M-Instruct", "all 12 weights", "Cut most",
    ):  # fmt: skip
        assert words in read.words, words
    for entry in plan.entries:
        assert entry.name in read.words
    figures = [attributes["aria-label"] for tag, attributes in read.tags if tag == "svg"]
    assert len(figures) == 5 + len(KINDS)
    assert "second-order estimate" in read.words
    assert "/home" not in read.words


@pytest.mark.long
def test_all_that_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    kind = '<img src="http://example.org/x" onerror="alert(2)">$\\frac{1}{0}$ & "co'
    names = [(f"model.layers.{i}.{kind}", i) for i in range(2)] + [("model.layers.0.]]>-->", 0)]
    plan, spectra = make_plan(model=ATTACK, names=names, notes=[f"note {ATTACK}"])
    samples = [Sample(prompt=f"<b>{ATTACK}", original="</p></main><h1>x", factored="<style>*{display:none}</style>")]
    run = make_run(plan, samples=samples, model=ATTACK, exclude=["</pre><script>"])
    read = page(tmp_path, run, plan, spectra)
    assert "</p></main><h1>x" in read.words
    assert f"note {ATTACK}" in read.words
    assert sum(tag == "h1" for tag, _ in read.tags) == 1
    assert sum(tag == "style" for tag, _ in read.tags) == 1
    write_card(tmp_path, run, plan)
    assert "<script" not in front_matter(tmp_path)[1].split("```yaml")[0]


def test_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    plan, _ = make_plan()
    run = make_run(plan)
    new = {"task": ..., "unit": ..., "quality": {"size", "prediction", "agreement", "scores"}}
    old = run.model_dump(mode="json", exclude=new)
    assert Run.model_validate(old) == run and run.quality is not None
    assert run.quality.words == "8 windows of 512 tokens" and "prediction" not in json.loads(plan.model_dump_json())


@pytest.mark.long
@pytest.mark.parametrize("unit", ["nats", "output", "weight"])
@pytest.mark.parametrize("losses", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_what_is_missing_is_said(tmp_path: Path, unit: str, losses: bool, dense: bool) -> None:
    allocate = "global" if losses else "uniform"
    names = [("model.layers.0.a.q_proj", 0), ("pooler.dense", None), ("model.layers.7.a.q_proj", 7)]
    plan, spectra = make_plan(names=names, unit=unit, losses=losses, dense=dense, allocate=allocate)
    run = make_run(plan, quality=False, samples=[])
    read = page(tmp_path, run, plan, spectra)
    write_card(tmp_path, run, plan)
    assert "not measured" in read.words
    assert ("none of its 3 weights is factorized" in read.words) == dense
    assert ("No spectra were taken" in read.words) == (not losses)
    assert ("No losses were predicted" in read.words) == (not losses)
    assert ("Nothing is left out" in read.words) == (losses and dense)
    assert not re.search(r"\b(nan|None|inf)\b", read.words)


@pytest.mark.long
def test_losses_without_a_spectrum_and_spectra_with_zeros(tmp_path: Path) -> None:
    plan, spectra = make_plan()
    page(tmp_path, make_run(plan), plan, {})
    spectra = {name: np.where(np.arange(len(v)) < 3, v, 0.0).astype(np.float32) for name, v in spectra.items()}
    page(tmp_path, make_run(plan), plan, spectra)
    page(tmp_path, make_run(plan), plan, {name: np.zeros_like(v) for name, v in spectra.items()})


def test_a_plan_without_any_weight(tmp_path: Path) -> None:
    plan, _ = make_plan(names=[])
    read = page(tmp_path, make_run(plan), plan, {})
    write_card(tmp_path, make_run(plan), plan)
    assert "no weight that could be factorized" in read.words


@pytest.mark.slow
def test_a_deep_model_of_many_kinds(tmp_path: Path) -> None:
    plan, spectra = make_plan(names=[(f"layers.{i}.part_{j}", i) for i in range(60) for j in range(12)])
    read = page(tmp_path, make_run(plan), plan, spectra)
    assert "layers.59.part_11" in read.words
    assert (tmp_path / "report.html").stat().st_size < 4_000_000


def test_kinds_of_one_name_and_several_roles_are_told_apart() -> None:
    roles = ("attention.output.dense", "intermediate.dense", "output.dense", "attention.self.query")
    plan, _ = make_plan(names=[(f"encoder.layer.{i}.{role}", i) for i in range(2) for role in roles])
    labels = kind_labels(plan)
    assert [labels[f"encoder.layer.1.{role}"] for role in roles] == [
        "attention.output.dense", "intermediate.dense", "layer.output.dense", "query",
    ]  # fmt: skip
    groups = by_kind(plan)
    assert [len(group.entries) for group in groups] == [2, 2, 2, 2]
    assert sum(group.after for group in groups) == plan.target_after


def test_the_loss_at_a_share_is_the_tail_of_the_spectrum() -> None:
    plan, spectra = make_plan()
    assert loss_at_share(plan.entries, spectra, 1.0, plain=False) == pytest.approx(0.0)
    entry = plan.entries[0]
    lost = loss_at_share([entry], spectra, entry.keep, plain=False)
    assert lost == pytest.approx(entry.predicted_loss)
    assert loss_at_share(plan.entries, {}, 0.5, plain=False) is None


@pytest.mark.parametrize(
    ("model", "base", "title"),
    [
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("org/model-1", "org/model-1", "org/model-1"),
        ("gpt2", "gpt2", "gpt2"),
        ("/home/someone/models/tiny", None, "tiny"),
        ("../models/tiny", None, "tiny"),
        ("C:\\Users\\someone\\tiny", None, "tiny"),
        ("models/tiny.gguf", None, "tiny.gguf"),
        ("LlamaForCausalLM", None, "LlamaForCausalLM"),
    ],
)
def test_the_card(tmp_path: Path, model: str, base: str | None, title: str) -> None:
    plan, _ = make_plan(model=model)
    run = make_run(plan, eval_text="/data/private/test.txt")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    write_card(tmp_path, run, plan)
    matter, body = front_matter(tmp_path)
    assert matter.get("base_model") == base
    assert matter["library_name"] == "transformers"
    assert matter["pipeline_tag"] == "text-generation"
    assert matter["tags"] == ["twofold", "low-rank", "factorized"]
    assert f"# {title}, factorized" in body
    assert "import twofold" in body and "AutoModelForCausalLM.from_pretrained" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["calibration"] == ["wiki.train.raw"]
    assert recipe["eval_text"] == "test.txt"
    assert recipe["tokens"] == run.recipe.tokens
    for words in ("someone", "/home", "/data", "Users", "private"):
        assert words not in body
    for words in (f"{plan.keep:.2%}", f"{plan.keep_model:.2%}", "26.21", "65,536", "ab" * 32, "seed: 0"):
        assert words in body.replace(" %", "%")


@pytest.mark.parametrize(
    ("architecture", "task", "expected", "tag"),
    [
        ("GPT2LMHeadModel", "causal-lm", "AutoModelForCausalLM", "text-generation"),
        ("BertForMaskedLM", "masked-lm", "AutoModelForMaskedLM", "fill-mask"),
        (
            "WhisperForConditionalGeneration",
            "speech",
            "WhisperForConditionalGeneration",
            "automatic-speech-recognition",
        ),
        ("T5ForConditionalGeneration", "seq2seq", "T5ForConditionalGeneration", None),
        ("no name'\"", "own", "AutoModel", None),
    ],
)
def test_the_card_names_the_class_to_load_with(
    tmp_path: Path, architecture: str, task: str, expected: str, tag: str | None
) -> None:
    plan, _ = make_plan()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    write_card(tmp_path, make_run(plan).model_copy(update={"task": task}), plan)
    matter, body = front_matter(tmp_path)
    assert f"model = {expected}.from_pretrained(" in body
    assert matter.get("pipeline_tag") == tag


def test_names_and_paths() -> None:
    assert public_name("Salesforce/wikitext") == "Salesforce/wikitext"
    assert public_name("~/texts/a b.txt") == "a b.txt"
    assert base_model("https://example.org/org/model") is None
    assert without_paths("held-out /home/me/wiki.txt, ~/b.txt and ./c/d.raw") == "held-out wiki.txt, b.txt and d.raw"
    assert without_paths(r"file:/a/b.txt (C:\x\y.txt)") == "file:b.txt (y.txt)"
    for words in ("tokens/second and 3/4 stay", "a / b", "<b>x</b>", "Salesforce/wikitext", "layer.3: rank 7; no more"):
        assert without_paths(words) == words


def test_numbers_for_people() -> None:
    assert number(61_234_567.0) == "6.12·10⁷"
    assert number(float("nan")) == "not a number"
    assert number(0.99999) == "1.00"
    assert number(12_345.6) == "12,346"


@pytest.mark.long
def test_matplotlib_is_imported_only_to_write_a_report() -> None:
    code = "import sys, twofold.report.card, twofold.report.page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
