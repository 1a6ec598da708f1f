"""Several runs on one page: what is compared, what is not, and that nothing from outside comes into it as markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import twofold
from pages import Page, make_plan, make_run
from twofold.errors import TwofoldError
from twofold.report.messages import Words
from twofold.report.record import Run, Sample
from twofold.report.runs import HIGHER, LOWER, RunGroup, front_of
from twofold.report.several import _differences, _table

ATTACK = '"><script>alert(1)</script><img src="http://example.org/x">&amp;'


def put(folder: Path, *, size: int = 10_000, apart: float | None = 0.1, samples: bool = True, **changed: Any) -> Path:
    """Write the record of a run that was made up, and return its folder.

    Args:
        size: of the model, in bytes.
        apart: its measured divergence; None for a run that was not measured.
        changed: fields of the run, and of its recipe.
    """
    plan, _ = make_plan(model=str(changed.pop("model", "smollm2")))
    fields = {name: changed.pop(name) for name in list(changed) if name in Run.model_fields}
    run = make_run(plan, quality=apart is not None, samples=None if samples else [], **changed)
    run = run.model_copy(update={"bytes_after": size, "seconds": {"total": 60.0}, **fields})
    if run.quality is not None:
        run.quality.factored["divergence"] = apart
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run.model_dump_json(), encoding="utf-8")
    plan.save(folder / "plan.json")
    return folder


def read(path: Path) -> Page:
    """Read a page, which must be whole, load nothing and run nothing."""
    found = Page(path.read_text(encoding="utf-8"))
    assert found.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & {tag for tag, _ in found.tags}
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src" not in policy  # type: ignore[operator]
    return found


def group(*folders: Path, out: Path) -> RunGroup:
    """Compare runs of one original."""
    report = twofold.report_runs(folders, out=out)
    assert len(report.groups) == 1
    return report.groups[0]


points = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=8).map(
    lambda drawn: dict(enumerate(drawn, 1))
)


@given(points)
def test_the_front_is_what_nothing_beats_and_beats_all_else(points: dict[int, tuple[int, int]]) -> None:
    front = front_of({number: (x, float(y)) for number, (x, y) in points.items()})

    def beats(one: int, other: int) -> bool:
        (x, y), (u, v) = points[one], points[other]
        return x <= u and y <= v and (x < u or y < v)

    assert not any(beats(one, other) for one in points for other in front)
    assert all(any(beats(one, other) for one in front) for other in points.keys() - set(front))
    sizes = [points[number] for number in front]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("lang", ["en", "es"])
def test_the_page_has_the_runs_their_front_and_what_differs(tmp_path: Path, lang: str) -> None:
    small = put(tmp_path / "small", size=6_000, apart=0.3)
    middle = put(tmp_path / "middle", size=8_100, apart=0.09, form="plain")
    large = put(tmp_path / "large", size=8_000, apart=0.05, refine=["distill"], samples=False)
    report = twofold.report_runs([small, middle, large], out=tmp_path / "runs.html", lang=lang)
    [compared] = report.groups
    [panel] = compared.panels
    assert (panel.measure, panel.front) == ("divergence", [1, 3])
    assert panel.points[2] == (8_100, 0.09)
    found = read(tmp_path / "runs.html")
    assert found.tags[0] == ("html", {"lang": lang})
    for name in ("● 1 · small", "○ 2 · middle", "● 3 · large", "Name a sea.", "The Baltic.", "distill", "plain"):
        assert name in found.words, name
    assert ("★ 0.0500" if lang == "en" else "★ 0,0500") in found.words
    [label] = [attributes["aria-label"] for tag, attributes in found.tags if tag == "svg"]
    assert label is not None and label.count(";") == 2
    assert Words(lang).say("runs.unsampled", runs="3") in found.words


def test_only_the_settings_that_differ_are_shown(tmp_path: Path) -> None:
    from twofold.report.runs import read_runs

    runs = read_runs([put(tmp_path / "a"), put(tmp_path / "b", form="plain", exclude=["lm_head", "o_proj"])])
    assert _differences(runs, Words()) == [("exclude", ["–", "lm_head, o_proj"]), ("form", ["gauge", "plain"])]
    put(tmp_path / "c")
    twofold.report_runs([tmp_path / "a", tmp_path / "c"], out=tmp_path / "runs.html")
    assert Words().say("runs.recipes.same") in read(tmp_path / "runs.html").words


def test_other_data_has_a_figure_of_its_own_and_no_best(tmp_path: Path) -> None:
    first, second, third = (put(tmp_path / name, size=10 - i, apart=0.1 * i) for i, name in enumerate("abc", 1))
    record = json.loads((third / "run.json").read_text())
    record["quality"]["original"]["loss"] *= 1.05  # of the same name, and not the same text
    (third / "run.json").write_text(json.dumps(record))
    compared = group(first, second, third, out=tmp_path / "runs.html")
    assert not compared.same_data and compared.perplexity is None
    assert [sorted(panel.points) for panel in compared.panels] == [[1, 2], [1, 2, 3]]
    measured = [row["cells"] for row in _table(compared, Words())]
    columns = [cell for cells in measured for cell, best in cells if best]
    assert columns == ["7\u00a0B"]  # the smallest; of its quality nothing is the best
    assert "different data" in read(tmp_path / "runs.html").words


def test_another_sum_of_the_same_data_is_the_same_data(tmp_path: Path) -> None:
    first, second = put(tmp_path / "a"), put(tmp_path / "b")
    record = json.loads((second / "run.json").read_text())
    record["quality"]["original"]["loss"] *= 1 + 1e-5
    (second / "run.json").write_text(json.dumps(record))
    assert group(first, second, out=tmp_path / "runs.html").same_data


def test_predictions_are_no_measurements(tmp_path: Path) -> None:
    measured, not_measured = put(tmp_path / "a"), put(tmp_path / "b", apart=None, size=9_000)
    compared = group(measured, not_measured, out=tmp_path / "runs.html")
    assert [(panel.measure, sorted(panel.points)) for panel in compared.panels] == [("predicted", [1, 2])]
    assert "Predicted, not measured" in read(tmp_path / "runs.html").words
    compared = group(measured, not_measured, put(tmp_path / "again", size=8_000), out=tmp_path / "runs.html")
    assert [sorted(panel.points) for panel in compared.panels] == [[1, 3], [1, 2, 3]]
    assert "Not in this figure: 2." in read(tmp_path / "runs.html").words
    neither = [put(tmp_path / name, apart=None, predicted_divergence=None) for name in "cd"]
    assert group(*neither, out=tmp_path / "runs.html").panels == []
    assert Words().say("runs.nothing") in read(tmp_path / "runs.html").words


def test_runs_of_different_originals_have_a_part_each(tmp_path: Path) -> None:
    folders = [put(tmp_path / "a"), put(tmp_path / "b", model="org/other"), put(tmp_path / "c", task="masked-lm")]
    report = twofold.report_runs(folders, out=tmp_path / "runs.html")
    assert [(part.model, part.task) for part in report.groups] == [
        ("SmolLM2-135M-Instruct", "causal-lm"), ("org/other", "causal-lm"), ("SmolLM2-135M-Instruct", "masked-lm")
    ]  # fmt: skip
    words = read(tmp_path / "runs.html").words
    assert "3 different originals or tasks" in words and "org/other, causal-lm" in words


def test_times_are_compared_only_where_each_has_its_calibration_in_it(tmp_path: Path) -> None:
    first = put(tmp_path / "a", seconds={"total": 100.0})
    fast = put(tmp_path / "b", seconds={"total": 50.0})
    again = put(tmp_path / "c", seconds={"total": 10.0}, moments_reused=True)

    def stars(*folders: Path) -> list[str]:
        table = _table(group(*folders, out=tmp_path / "runs.html"), Words())
        return [cell for row in table for cell, best in row["cells"] if best]

    assert stars(first, fast) == ["50.0\u00a0s"]
    assert stars(first, again) == []
    assert "used again in 2" in read(tmp_path / "runs.html").words


def test_known_scores_are_told_apart_by_which_is_better(tmp_path: Path) -> None:
    assert not HIGHER & LOWER
    folders = [put(tmp_path / "a"), put(tmp_path / "b")]
    for folder, (wer, bleu, own) in zip(folders, ((0.1, 20.0, 1.0), (0.2, 30.0, 2.0)), strict=True):
        record = json.loads((folder / "run.json").read_text())
        record["quality"]["scores"] = {"wer": [0.05, wer], "bleu": [35.0, bleu], "own": [3.0, own]}
        (folder / "run.json").write_text(json.dumps(record))
    table = _table(group(*folders, out=tmp_path / "runs.html"), Words())
    assert [[cell for cell, best in row["cells"] if best] for row in table] == [["0.1000"], ["30.00"]]


def test_nothing_from_outside_is_markup(tmp_path: Path) -> None:
    samples = [Sample(prompt=f"<b>{ATTACK}", original="</p></main><h1>x", factored="<style>*{display:none}</style>")]
    hostile = {"model": f"/models/{ATTACK}", "exclude": [ATTACK], "task": ATTACK}
    folder = '<img src=x onerror="alert(2)">$\\frac{1}{0}$' + "long " * 40
    one = put(tmp_path / folder.replace("/", ""), samples=False, **hostile).resolve()
    record = json.loads((one / "run.json").read_text())
    record["samples"] = [sample.model_dump() for sample in samples]
    record["quality"]["text"] = record["quality"]["prediction"] = ATTACK
    (one / "run.json").write_text(json.dumps(record))
    other = put(tmp_path / "b", **{**hostile, "exclude": []})
    twofold.report_runs([one, other], out=tmp_path / "runs.html")
    found = read(tmp_path / "runs.html")
    assert sum(tag == "h1" for tag, _ in found.tags) == 1 and sum(tag == "style" for tag, _ in found.tags) == 1
    assert "</p></main><h1>x" in found.words and f"<b>{ATTACK}" in found.words
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert str(tmp_path) not in found.words


def test_originals_that_answer_differently_are_both_shown(tmp_path: Path) -> None:
    folders = [put(tmp_path / "a"), put(tmp_path / "b")]
    record = json.loads((folders[1] / "run.json").read_text())
    record["samples"][0]["original"] = "The Aegean."
    (folders[1] / "run.json").write_text(json.dumps(record))
    twofold.report_runs(folders, out=tmp_path / "runs.html")
    words = read(tmp_path / "runs.html").words
    assert "original, in runs 1" in words and "The Aegean." in words and "The Baltic." in words


def test_a_single_run_gets_its_own_report_again(tmp_path: Path) -> None:
    folder = put(tmp_path / "a")
    report = twofold.report_runs(folder, lang="es")
    assert report.page == str(folder / "report.html")
    page = read_single(folder / "report.html")
    assert page.tags[0] == ("html", {"lang": "es"}) and "factorizado" in page.words
    other = twofold.report_runs(folder, out=tmp_path / "own.html")
    assert Path(other.page).read_text(encoding="utf-8") != (folder / "report.html").read_text(encoding="utf-8")


def read_single(path: Path) -> Page:
    found = Page(path.read_text(encoding="utf-8"))
    assert found.open == []
    return found


def test_only_pages_of_its_kind_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [put(tmp_path / "a"), put(tmp_path / "b")]
    monkeypatch.chdir(tmp_path)
    twofold.report_runs(folders[0])
    own = (folders[0] / "report.html").read_bytes()
    assert twofold.report_runs(folders).page == "runs.html"
    twofold.report_runs(folders)  # again: it is ours
    for taken in (folders[0] / "report.html", tmp_path / "notes.html"):
        if not taken.exists():
            taken.write_text("mine")
        with pytest.raises(TwofoldError, match="is not replaced"):
            twofold.report_runs(folders, out=taken)
    assert (folders[0] / "report.html").read_bytes() == own
    with pytest.raises(TwofoldError, match="is not replaced"):
        twofold.report_runs(folders[0], out=tmp_path / "runs.html")
    twofold.report_runs(folders, out=tmp_path / "notes.html", overwrite=True)
    assert "runs compared" in read(tmp_path / "notes.html").words
    with pytest.raises(TwofoldError, match="is a folder"):
        twofold.report_runs(folders, out=tmp_path, overwrite=True)


def test_what_is_no_run_is_refused_in_words(tmp_path: Path) -> None:
    run = put(tmp_path / "sizes" / "a")
    tuned, broken, empty = (tmp_path / name for name in ("tuned", "broken", "empty"))
    for folder, record in ((tuned, '{"kind": "tune"}'), (broken, '{"recipe": 3}')):
        folder.mkdir()
        (folder / "run.json").write_text(record)
    empty.mkdir()
    for folder, told in (
        (tmp_path / "nowhere", "there is no folder"),
        (tuned, "was written by twofold tune"),
        (broken, "not the record of a compression"),
        (empty, "has no run.json"),
        (tmp_path / "sizes", "is no run but holds some"),
        (run.parent / ".." / "sizes" / "a", "named twice"),
    ):
        with pytest.raises(TwofoldError, match=told):
            twofold.report_runs([run, folder], out=tmp_path / "runs.html")
    with pytest.raises(TwofoldError, match="name the folders"):
        twofold.report_runs([])
    with pytest.raises(TwofoldError, match="there is no language 'fr'"):
        twofold.report_runs([run], lang="fr")
    assert not (tmp_path / "runs.html").exists()


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    compared = group(put(tmp_path / "x" / "out"), put(tmp_path / "y" / "out"), out=tmp_path / "runs.html")
    assert [row.name for row in compared.rows] == ["x/out", "y/out"]
