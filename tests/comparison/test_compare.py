"""The arena: each cell is what compress and eval give, work is shared and resumed, and what can't be done says why."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

import twofold.cli
from conftest import TEXT, make_model, make_tokenizer
from runs import kill_program, run_program
from twofold.comparison.arena import compare
from twofold.comparison.cells import only_run
from twofold.comparison.grid import Cell, make_grid
from twofold.comparison.quantized import choose_baselines, quantized, torchao_version
from twofold.comparison.record import Comparison
from twofold.comparison.rows import GridRunner
from twofold.comparison.shared import GridSetup, set_up
from twofold.errors import TwofoldError
from twofold.evaluation.evaluate import evaluate
from twofold.host.cache import cache_folder
from twofold.model.weights import find_targets
from twofold.nn.places import put_back
from twofold.run.compress import compress
from twofold.task.text.texts import read_texts

NO_TORCHAO = "torchao is not installed: pip install 'twofold[quantize]'"
FILES = ("compare.csv", "compare.json", "compare.md", "compare.png", "compare.svg")


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch, request):
    """Leave the figure's files empty, but in the tests marked ``whole``: it takes as long as several cells."""
    if "whole" not in request.keywords:
        monkeypatch.setattr("twofold.comparison.arena.draw_front", lambda _, paths: [path.touch() for path in paths])


@pytest.fixture
def other_text(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(TEXT.upper()[::-1] * 2, encoding="utf-8")
    return path


@pytest.fixture
def settings(checkpoint, text_file, other_text):
    return {
        "model": str(checkpoint), "calibration": [str(text_file)], "tokens": 128, "window": 32, "keep": [0.7],
        "eval_text": str(text_file), "other_text": [str(other_text)], "eval_windows": 2, "baselines": [],
        "refine_steps": 2,
    }  # fmt: skip


def figures(comparison: Comparison) -> list[dict[str, object]]:
    """All that must be equal to the bit when a row is measured again: no times."""
    rows = []
    for row in comparison.rows:
        kept = row.model_dump(exclude={"seconds", "notes"})
        kept["refinement"] = [(one.loss_before, one.loss_after, one.steps) for one in row.refinement]
        rows.append(kept)
    return rows


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command in this process: (exit code, standard output, standard error)."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["twofold", *map(str, arguments)])
        code = 0
        try:
            twofold.cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else (0 if stop.code is None else 1)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def refused(result, message):
    code, out, err = result
    assert code == 2, err
    assert out == "" and message in err
    assert err.startswith("twofold: ") and err.count("\n") == 1, "one sentence, no traceback"


def test_values_between_commas_and_chains(settings):
    grid = make_grid({**settings, "objectives": ["svd,asvd", "svd"], "keep": ["0.8,0.6", "0.8"],
                      "refine": ["none,anchored", "blockwise+distill"]})  # fmt: skip
    assert grid.objectives == ["svd", "asvd"] and grid.keep == [0.8, 0.6]
    assert grid.refine == [[], ["anchored"], ["blockwise", "distill"]]
    assert len(list(grid.cells())) == 2 * 1 * 2 * 3
    assert grid.recipe(Cell("svd", "global", 0.8, ())).objective == "svd"


def test_a_published_method_is_an_objective_and_a_closed_form(settings):
    grid = make_grid({**settings, "objectives": ["svd-llm,two-sided,anchored,aa-svd"], "keep": ["0.8"],
                      "refine": ["none,distill,anchored"]})  # fmt: skip
    refined = [(), ("distill",), ("anchored",)]
    assert [(cell.objective, cell.refine) for cell in grid.cells()] == [
        *(("svd-llm", chain) for chain in [*refined, ("anchored", "distill")]), *(("two-sided", chain) for chain in refined),
    ]  # fmt: skip
    alone = make_grid({**settings, "objectives": ["aa-svd"], "keep": ["0.8"]})
    assert [cell.words for cell in alone.cells()] == ["svd-llm, global, keep 0.8, anchored"]
    assert alone.chains == [("anchored",)] and alone.kernels == ["svd-llm"]


def test_a_published_rule_brings_its_ranks_and_its_form(settings):
    named = {**settings, "objectives": ["two-sided,lite-asr"], "keep": ["0.8"]}
    grid = make_grid(named)
    two_sided, lite = grid.cells()
    assert [cell.words for cell in (two_sided, lite)] == ["two-sided, global, keep 0.8", "lite-asr, lite-asr, keep 0.8"]
    assert (grid.recipe(lite).form, grid.recipe(lite).rank_multiple) == ("plain", 16)
    assert (grid.recipe(two_sided).form, grid.recipe(two_sided).rank_multiple) == ("gauge", None)
    assert (
        "--allocate" not in grid.command() and "--allocate global" in make_grid({**settings, "keep": ["0.8"]}).command()
    )
    own = make_grid({**named, "allocate": ["uniform", "global"], "form": "gauge"})
    assert [cell.allocate for cell in own.cells()] == ["uniform", "global"] * 2
    assert {own.recipe(cell).form for cell in own.cells()} == {"gauge"}
    assert "--allocate uniform,global" in own.command()


@pytest.mark.long
def test_lite_asr_is_a_row_like_the_others(settings, tmp_path):
    """Its moments are collected with the others', which stay as they were; it joins rows that are measured already."""
    settings = {
        **settings,
        "model": str(tmp_path / "gpt2"),
        "rank_multiple": 4,
        "other_text": [],
        "objectives": ["two-sided"],
    }
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    first = compare(settings, tmp_path / "arena", quiet=True)
    made = compare({**settings, "objectives": ["two-sided", "lite-asr"]}, tmp_path / "arena", quiet=True)
    assert figures(made)[:2] == figures(first)
    own = {name: value for name, value in settings.items() if name not in ("objectives", "other_text", "baselines")}
    alone = compress({**own, "keep": 0.7, "objective": "lite-asr"}, tmp_path / "alone", quiet=True)
    row = made.rows[2]
    assert row.name == "lite-asr, lite-asr, keep 0.7" and any("mean of the inputs" in note for note in row.notes)
    assert row.parameters == alone.parameters_after and 0.6 < row.keep <= 0.7
    assert row.perplexity[0] == pytest.approx(alone.quality.factored["perplexity"], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("objective", "allocate", "chain"),
    [("svd", "uniform", []), ("asvd", "global", []), ("fwsvd", "global", []), ("svd-llm", "uniform", ["anchored"]),
     ("two-sided", "global", []), ("two-sided", "uniform", ["blockwise", "distill"])],
)  # fmt: skip
def test_a_cell_is_what_compress_and_eval_give(settings, objective, allocate, chain, text_file, other_text, tmp_path):
    """In a grid with other objectives, whose moments are collected in the same pass."""
    objectives = list(dict.fromkeys([objective, "svd", "two-sided", "fwsvd"]))
    grid = make_grid({**settings, "objectives": objectives, "allocate": allocate, "refine": [chain]})
    made = compare(grid, tmp_path / "arena", quiet=True)
    (row,) = [r for r in made.rows if r.objective == objective]
    recipe = grid.recipe(Cell(objective, allocate, 0.7, tuple(chain)))
    alone = compress(recipe, tmp_path / "alone", quiet=True)
    assert row.parameters == alone.parameters_after and row.bytes == alone.bytes_after
    assert row.keep == alone.keep and (row.predicted_divergence is None) == (alone.predicted_divergence is None)
    assert (row.predicted_divergence or 0) == pytest.approx(alone.predicted_divergence or 0, rel=1e-5)
    for i, text in enumerate((text_file, other_text)):
        dense, small = evaluate(
            str(tmp_path / "alone"), str(text), against=settings["model"], windows=2, window=128, quiet=True
        ).models
        assert made.dense.perplexity[i] == pytest.approx(dense.perplexity, rel=1e-6)
        assert row.perplexity[i] == pytest.approx(small.perplexity, rel=1e-4)
        assert row.ratio[i] == row.perplexity[i] / made.dense.perplexity[i]
        if i == 0:
            assert row.divergence == pytest.approx(small.divergence, rel=1e-3)


@pytest.mark.long
def test_moments_are_collected_once_and_texts_read_once(settings, tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(
        "twofold.task.text.windows.read_texts", lambda *a, **k: (reads.append(a), read_texts(*a, **k))[1]
    )
    decomposed = []
    once = GridSetup.decompose
    monkeypatch.setattr(GridSetup, "decompose", lambda self, o: (decomposed.append(o.name), once(self, o))[1])
    objectives = ["svd", "asvd", "fwsvd", "svd-llm", "two-sided"]
    grid = {**settings, "objectives": objectives, "keep": [0.7, 0.5], "allocate": ["uniform", "global"]}
    made = compare(grid, tmp_path / "arena", quiet=True)
    assert len(made.measured) == 1 + 5 * 2 * 2
    assert len(list((cache_folder() / "moments").iterdir())) == 1
    assert len(reads) == 1 and decomposed == objectives
    assert made.fingerprint and made.calibration_tokens == 128


@pytest.mark.long
def test_what_needs_no_moments_collects_none(settings, tmp_path):
    made = compare({**settings, "objectives": "svd"}, tmp_path / "arena", quiet=True)
    assert not (cache_folder() / "moments").exists() and made.calibration_tokens == 0
    assert made.rows[1].divergence > 0 and made.rows[1].predicted_divergence is None


@pytest.mark.long
def test_an_interrupted_grid_goes_on(settings, tmp_path, monkeypatch):
    grid = {**settings, "objectives": ["svd-llm", "two-sided"], "keep": [0.7, 0.5], "refine": ["none", "distill"]}
    whole = compare(grid, tmp_path / "whole", quiet=True)
    done: list[str] = []
    real = GridRunner.factored

    def stopped(self, cell, of, work):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(cell.name)
        return real(self, cell, of, work)

    monkeypatch.setattr(GridRunner, "factored", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(grid, tmp_path / "arena", quiet=True)
    assert not [name for name in FILES if (tmp_path / "arena" / name).exists()]
    assert len(list((tmp_path / "arena" / "cells").iterdir())) == 1 + 3  # the dense model's, and those that were done
    before = set(done)
    monkeypatch.setattr(
        GridRunner, "factored", lambda self, cell, of, work: (done.append(cell.name), real(self, cell, of, work))[1]
    )
    assert figures(compare(grid, tmp_path / "arena", quiet=True)) == figures(whole)
    assert len(done) == 8 and len(set(done)) == 8 and before < set(done)
    assert sorted(p.name for p in (tmp_path / "arena").iterdir()) == sorted([*FILES, "arena.json", "cells"])


@pytest.mark.slow
def test_a_killed_grid_goes_on(settings, tmp_path):
    """Killed at any point: what was finished stays, and the rows are those of a run that was not killed, to the bit."""
    out, cache = tmp_path / "arena", tmp_path / "cache"
    command = [
        "compare", settings["model"], "--calibration", *settings["calibration"], "--tokens", "128", "--window", "32",
        "--keep", "0.7,0.5", "--objectives", "svd-llm,two-sided", "--refine", "none,anchored,blockwise+distill",
        "--refine-steps", "4", "--baselines", "none", "--json",
    ]  # fmt: skip
    kill_program([*command, "--out", str(out)], cache, "*/cells/svd-llm_global_0.5_none.json")
    cells = {path.name: path.read_bytes() for path in out.glob("cells/*.json")}
    assert 4 <= len(cells) < 13 and not [name for name in FILES if (out / name).exists()]
    again = run_program([*command, "--out", str(out)], cache)
    assert all((out / "cells" / name).read_bytes() == content for name, content in cells.items())
    whole = run_program([*command, "--out", str(tmp_path / "whole")], tmp_path / "other")
    assert figures(Comparison.model_validate_json(again.stdout)) == figures(
        Comparison.model_validate_json(whole.stdout)
    )


@pytest.mark.long
def test_a_larger_grid_runs_its_new_cells_only(settings, tmp_path, monkeypatch):
    first = compare({**settings, "objectives": ["two-sided"]}, tmp_path / "arena", quiet=True)
    done: list[float] = []
    real = GridRunner.factored
    monkeypatch.setattr(
        GridRunner, "factored", lambda self, cell, of, work: (done.append(cell.keep), real(self, cell, of, work))[1]
    )
    second = compare({**settings, "objectives": ["two-sided"], "keep": [0.7, 0.5]}, tmp_path / "arena", quiet=True)
    assert done == [0.5] and figures(second)[:2] == figures(first)
    # All rows are there: neither the moments nor a decomposition is needed any more.
    monkeypatch.setattr(GridSetup, "decompose", lambda self, o: 1 / 0)
    again = compare({**settings, "objectives": ["two-sided"], "keep": [0.7, 0.5]}, tmp_path / "arena", quiet=True)
    assert figures(again) == figures(second)


@pytest.mark.long
def test_a_broken_or_foreign_cell_is_measured_again(settings, tmp_path):
    made = compare({**settings, "keep": [0.7, 0.5]}, tmp_path / "arena", quiet=True)
    first, second = (
        tmp_path / "arena" / "cells" / f"{Cell('two-sided', 'global', k, ()).name}.json" for k in (0.7, 0.5)
    )
    second.write_bytes(second.read_bytes()[:100])
    kept = json.loads(first.read_text())
    first.write_text(json.dumps({**kept, "mark": "of another run", "row": {**kept["row"], "divergence": 0.0}}))
    assert figures(compare({**settings, "keep": [0.7, 0.5]}, tmp_path / "arena", quiet=True)) == figures(made)


@pytest.mark.long
def test_a_foreign_folder_is_refused(settings, tmp_path, text_file):
    out = tmp_path / "arena"
    compare(settings, out, quiet=True)
    for change, differs in (
        ({"seed": 3}, "differs in: seed"),
        ({"tokens": 64}, "calibration text, held-out text, tokens"),
        ({"eval_windows": 1}, "texts to measure on"),
        ({"damping": 0.5}, "damping"),
    ):
        with pytest.raises(TwofoldError, match=differs):
            compare({**settings, **change}, out, quiet=True)
    make_model(seed=5).save_pretrained(settings["model"])
    with pytest.raises(TwofoldError, match="differs in: model"):
        compare(settings, out, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(TwofoldError, match="was not written by twofold compare"):
        compare(settings, tmp_path / "mine", quiet=True)
    with pytest.raises(TwofoldError, match="is a file"):
        compare(settings, text_file, quiet=True)


@pytest.mark.long
def test_cells_that_are_impossible_carry_a_reason(settings, tmp_path):
    grid = {**settings, "objectives": ["svd", "two-sided"], "keep": [0.7, 0.01], "refine": ["none", "anchored"]}
    made = compare(grid, tmp_path / "arena", quiet=True)
    reasons = {row.name: row.skipped for row in made.rows if row.skipped is not None}
    assert set(reasons) == {
        "svd, global, keep 0.7, anchored", "svd, global, keep 0.01", "svd, global, keep 0.01, anchored",
        "two-sided, global, keep 0.01", "two-sided, global, keep 0.01, anchored",
    }  # fmt: skip
    assert "looks at whole inputs, and `objective=svd` does not" in reasons["svd, global, keep 0.7, anchored"]
    assert "below the smallest possible" in reasons["two-sided, global, keep 0.01"]
    assert len(made.measured) == 1 + 3
    words = (tmp_path / "arena" / "compare.md").read_text()
    assert all(name in words and reason in words for name, reason in reasons.items())


@pytest.mark.long
def test_a_cell_that_fails_is_a_row_and_the_model_is_whole_for_the_next(settings, tmp_path, monkeypatch):
    grid = {**settings, "objectives": "two-sided", "refine": ["distill", "none"]}
    whole = compare({**grid, "refine": ["none"]}, tmp_path / "whole", quiet=True)

    def fail(*args, **kwargs):
        raise TwofoldError("no such luck")

    monkeypatch.setattr("twofold.comparison.rows.refine", fail)
    made = compare(grid, tmp_path / "arena", quiet=True)
    assert made.rows[1].skipped == "no such luck" and made.rows[1].perplexity == []
    assert figures(made)[2] == figures(whole)[1]
    assert not (tmp_path / "arena" / "cells" / f"{Cell('two-sided', 'global', 0.7, ('distill',)).name}.json").exists()


@pytest.mark.long
def test_the_model_is_dense_again_after_every_cell(settings, tmp_path, monkeypatch):
    ids = torch.arange(40)[None]
    seen: list[torch.Tensor] = []
    real = GridRunner.cell

    def watched(self, cell, of):
        row = real(self, cell, of)
        with torch.no_grad():
            seen.append(self.setup.model(input_ids=ids).logits)
        return row

    monkeypatch.setattr(GridRunner, "cell", watched)
    compare({**settings, "refine": ["none", "anchored", "blockwise+distill"]}, tmp_path / "arena", quiet=True)
    shared = set_up(make_grid(settings), quiet=True)
    with torch.no_grad():
        dense = shared.model(input_ids=ids).logits
    assert len(seen) == 3 and all(torch.equal(one, dense) for one in seen)


def test_modules_are_put_back_however_the_block_ends(model):
    names = [target.name for target in find_targets(model).targets]
    before = [model.get_submodule(name) for name in names]
    with pytest.raises(KeyboardInterrupt), put_back(model, names):
        parent = model.get_submodule(names[0].rpartition(".")[0])
        setattr(parent, names[0].rpartition(".")[2], torch.nn.Linear(32, 32))
        raise KeyboardInterrupt
    assert all(model.get_submodule(name) is module for name, module in zip(names, before, strict=True))


@pytest.mark.whole
@pytest.mark.long
def test_the_files_agree(settings, tmp_path):
    grid = {**settings, "objectives": ["svd", "two-sided"], "keep": [0.8, 0.6], "refine": ["none", "anchored"]}
    made = compare(grid, tmp_path / "arena", quiet=True)
    read = Comparison.model_validate_json((tmp_path / "arena" / "compare.json").read_text())
    assert read == made
    with (tmp_path / "arena" / "compare.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [row.name for row in made.rows]
    words = (tmp_path / "arena" / "compare.md").read_text()
    table = [line for line in words.splitlines() if line.startswith("| ")][2:]
    assert len(table) == len(made.measured)
    for line, row in zip(lines, made.rows, strict=True):
        assert line["skipped"] == (row.skipped or "")
        if row.skipped is None:
            assert float(line["perplexity texts.txt (in-domain)"]) == row.perplexity[0]
            assert float(line["perplexity stories.txt (out-of-domain)"]) == row.perplexity[1]
            assert int(line["bytes"]) == row.bytes and int(line["bytes_16"]) == row.bytes_16
    for line, row in zip(table, made.measured, strict=True):
        assert f"{row.ratio[0]:.3f}" in line and f"{row.bytes / 1e6:,.1f}" in line
    for text in made.texts:
        assert text.sha256 in words
    assert made.calibration_sha256 in words and made.command in words and "seed 0" in words
    assert str(tmp_path) not in words and str(tmp_path) not in (tmp_path / "arena" / "compare.json").read_text()
    assert (tmp_path / "arena" / "compare.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "arena" / "compare.svg").read_text()
    assert "<svg" in svg and "Pareto front" in svg and "stories.txt" in svg


@pytest.mark.long
def test_the_front_holds_what_nothing_beats(settings, tmp_path):
    made = compare({**settings, "objectives": ["svd", "two-sided"], "keep": [0.8, 0.5]}, tmp_path / "arena", quiet=True)
    for text in range(2):
        front = made.front(text)
        for row in made.measured:
            beaten = any(
                other.bytes_16 <= row.bytes_16 and other.perplexity[text] < row.perplexity[text]
                for other in made.measured
            )
            assert (row in front) == (not beaten)


@pytest.mark.long
def test_the_command_prints_json_or_a_table(run, checkpoint, text_file, other_text, tmp_path):
    command = ["compare", checkpoint, "--objectives", "svd,two-sided", "--keep", "0.8", "--keep", "0.6", "--refine", "none",
               "--allocate", "uniform,global", "--calibration", text_file, "--tokens", 96, "--window", 32, "--eval-text",
               text_file, "--other-text", other_text, "--eval-windows", 1, "--out", tmp_path / "arena"]  # fmt: skip
    code, out, err = run(*command, "--json")
    assert code == 0, err
    made = Comparison.model_validate_json(out)
    assert [row.name for row in made.rows if row.kind == "factored"][:2] == [
        "svd, uniform, keep 0.8", "svd, uniform, keep 0.6",
    ]  # fmt: skip
    assert "row 1 of" in err and "svd, uniform, keep 0.8" in err
    code, out, err = run(*command, "--quiet")
    assert code == 0 and err == "" and "two-sided" in out and "compare.md" in out


def test_help_shows_the_flags_of_the_grid_and_of_the_recipe(run):
    code, out, _ = run("compare", "--help")
    assert code == 0 and "Pydantic" not in out
    assert all(
        flag in out for flag in ("--objectives", "--refine", "--baselines", "--other-text", "--tokens", "--damping")
    )
    assert not any(f"{flag} " in out for flag in ("--objective", "--budget"))


def test_settings_of_a_recipe_hold_for_every_cell(run, checkpoint, text_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint}\ncalibration: [{text_file}]\ntokens: 96\nwindow: 32\nkeep: 0.5\n"
                      "objective: svd-llm\nform: plain\noverrides:\n  v_proj: {dense: true}\n")  # fmt: skip
    command = ["compare", "--recipe", recipe, "--baselines", "none", "--out", tmp_path / "arena", "--json", "--quiet"]
    code, out, err = run(*command)
    assert code == 0, err
    made = Comparison.model_validate_json(out)
    (row,) = made.rows[1:]
    assert (row.objective, row.asked) == ("svd-llm", 0.5) and row.keep > 0.4
    assert "--form plain" in made.command and "v_proj=dense" in made.command
    assert made.texts[0].name == "held-out texts.txt" and made.texts[0].domain == "in"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--keep is missing"),
        (["--keep", "0.5,0"], "--keep"),
        (["--keep", "1.5"], "--keep"),
        (["--keep", "much"], "--keep"),
        (["--keep", "0.5", "--objectives", "svd,magic"], "there is no objective 'magic'"),
        (["--keep", "0.5", "--allocate", "magic"], "there is no allocation 'magic'"),
        (["--keep", "0.5", "--refine", "none,magic"], "there is no refinement 'magic'"),
        (
            ["--keep", "0.5", "--objectives", "svd,asvd", "--refine", "none,anchored"],
            "looks at whole inputs, and --objective",
        ),
        (["--keep", "0.5", "--baselines", "int3"], "there is no baseline 'int3'"),
        (["--keep", "0.5", "--tokens", "0"], "--tokens"),
        (["--keep", "0.0001"], "below the smallest possible"),
        (["--keep", "0.5", "--other-text", "no.txt"], "there is no file"),
        (["--keep", "0.5", "--window", "4096"], "longer than this model's 128 positions"),
        (["--keep", "0.5", "--stream", "always"], "holds the model whole in memory"),
    ],
)
def test_bad_input_is_refused_before_any_work(run, checkpoint, text_file, tmp_path, arguments, message):
    flags = [] if "--tokens" in arguments or "--window" in arguments else ["--tokens", 96, "--window", 32]
    refused(
        run("compare", checkpoint, "--calibration", text_file, *flags, *arguments, "--out", tmp_path / "a", "--quiet"),
        message,
    )
    assert not (tmp_path / "a").exists() and not (cache_folder() / "moments").exists()


def test_a_budget_is_no_keep_ratio(settings, tmp_path):
    with pytest.raises(TwofoldError, match="goes by keep ratios"):
        compare({**settings, "budget": "70%"}, tmp_path / "arena", quiet=True)


@pytest.mark.long
def test_baselines_without_torchao(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("twofold.comparison.quantized.torchao_version", lambda: None)
    with pytest.raises(TwofoldError, match="need torchao, which is not installed: pip install"):
        compare({**settings, "baselines": "int8,int4"}, tmp_path / "arena", quiet=True)
    made = compare({**settings, "baselines": None}, tmp_path / "arena", quiet=True)
    assert "torchao is not installed" in made.notes[0]
    assert {row.kind for row in made.rows} == {"dense", "factored"}
    assert choose_baselines([]) == ([], None)


@pytest.mark.long
@pytest.mark.skipif(torchao_version() is None, reason=NO_TORCHAO)
def test_baselines_are_measured_at_the_bytes_that_they_store(settings, tmp_path):
    made = compare({**settings, "baselines": "int8,int4"}, tmp_path / "arena", quiet=True)
    dense, eight, four = made.rows[:3]
    targets = find_targets(make_model())
    kept = targets.total_numbers - targets.target_numbers
    rows = sum(t.out_features for t in targets.targets)
    assert eight.bytes == 4 * kept + targets.target_numbers + 4 * rows
    groups = sum(t.size // 32 if t.in_features % 32 == 0 else t.out_features for t in targets.targets)
    assert four.bytes_16 == 2 * kept + targets.target_numbers // 2 + 2 * groups
    assert 0 < eight.divergence < four.divergence
    assert abs(eight.ratio[0] - 1) < abs(four.ratio[0] - 1)
    assert dense.ratio == [1.0, 1.0] and "groups of 32" in four.notes[0]


@pytest.mark.skipif(torchao_version() is None, reason=NO_TORCHAO)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(("name", "steps"), [("int8", 127), ("int4", 7)])
def test_quantized_weights_are_within_half_a_step(architecture, name, steps):
    model = make_model(architecture)
    ids = torch.arange(40)[None]
    targets = find_targets(model).targets
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with quantized(model, targets, name):
            for target in targets:
                layer = model.get_submodule(target.name)
                exact = dict(make_model(architecture).named_modules())[target.name].weight
                exact = exact.T if target.transposed else exact
                wide = layer.weight.dequantize()
                groups = [] if name == "int8" else [g for g in (128, 32) if target.in_features % g == 0]
                group = next(iter(groups), target.in_features)
                largest = exact.reshape(-1, group).abs().amax(1)
                off = (wide - exact).reshape(-1, group).abs().amax(1)
                assert (off <= 0.51 * largest / steps + 1e-6).all()
            assert not torch.equal(model(input_ids=ids).logits, before)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_two_comparisons_do_not_write_to_one_folder(settings, tmp_path):
    out = Path(tmp_path / "arena").resolve()
    with only_run(out), pytest.raises(TwofoldError, match="another comparison works on"):
        compare(settings, out, quiet=True)


@pytest.mark.long
def test_an_objective_that_does_not_go_with_the_model_is_skipped(settings, tmp_path, monkeypatch):
    """The rows of the others are measured and written all the same."""
    decomposed = GridSetup.decompose

    def failing(shared, objective):
        if objective.name == "svd-llm":
            raise TwofoldError("nothing to cut in this model")
        return decomposed(shared, objective)

    monkeypatch.setattr(GridSetup, "decompose", failing)
    made = compare({**settings, "objectives": "svd-llm,two-sided"}, tmp_path / "arena", quiet=True)
    assert [row.skipped for row in made.rows[1:]] == ["nothing to cut in this model", None]
    assert (tmp_path / "arena" / "compare.md").is_file()


@pytest.mark.long
def test_what_belongs_to_a_comparison_outlives_a_rerun(settings, tmp_path):
    first = compare({**settings, "refine": "none"}, tmp_path / "arena", quiet=True)
    again = compare({**settings, "refine": "none"}, tmp_path / "arena", quiet=True)
    assert again.fingerprint == first.fingerprint != ""
    # A refinement that is added later finds the same texts.
    more = compare({**settings, "refine": "none,distill"}, tmp_path / "arena", quiet=True)
    assert figures(more)[:2] == figures(first)


@pytest.mark.long
def test_a_refinement_can_be_added_without_a_text_to_measure_on(settings, tmp_path):
    settings = {**settings, "eval_text": None, "other_text": []}
    first = compare({**settings, "refine": "none"}, tmp_path / "arena", quiet=True)
    more = compare({**settings, "refine": "none,distill"}, tmp_path / "arena", quiet=True)
    assert figures(more)[:2] == figures(first)
