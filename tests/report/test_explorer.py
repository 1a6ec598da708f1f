"""The live part of the page: what it plans from, that it plans what the program plans, and that it was built of its sources."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import twofold
from explorer_cases import ATTACK, CASES, PLANS, case, planned, request_for
from twofold.errors import TwofoldError
from twofold.evidence.beside import Beside
from twofold.recipe import Recipe
from twofold.report.explorer import MOST, embedded, explorer_data, thinned
from twofold.report.messages import Words, _table
from twofold.report.page import check_page, write_page

WEB = PLANS.parents[1]
BUILT = WEB.parent / "src" / "twofold" / "report" / "web"


@pytest.mark.parametrize("name", CASES)
def test_the_pages_own_tests_hold_it_to_what_the_program_plans_now(name: str) -> None:
    """web/tests/allocate.test.ts plans each of these in the page; here they are held to the program."""
    kept = {kept["name"]: kept for kept in json.loads(PLANS.read_text(encoding="utf-8"))}
    made = json.loads(json.dumps(case(name)))
    assert len(made["planned"]) >= 20 and len({tuple(at) for _, at in made["planned"]}) > 5
    assert kept[name]["planned"] == made["planned"], "write them anew: python tests/explorer_cases.py"
    assert {k: v for k, v in kept[name]["data"].items() if k != "numbers"} == {
        k: v for k, v in made["data"].items() if k != "numbers"
    }


def sources() -> str:
    """Return the hash of all that the built page is made of; web/vite.config.ts has the same."""
    paths = [path for path in (WEB / "src").rglob("*") if path.is_file()]
    paths += [WEB / "package-lock.json", WEB / "vite.config.ts", BUILT.parent / "messages.json"]
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        total.update(path.read_bytes())
    return total.hexdigest()


def test_the_built_page_is_that_of_its_sources() -> None:
    mark = (BUILT / "sources.sha256").read_text(encoding="ascii").split()
    built = b"".join((BUILT / name).read_bytes() for name in ("explorer.css", "explorer.js"))
    assert mark == [sources(), hashlib.sha256(built).hexdigest()], "build it anew: make web"


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    request = request_for(1, keep=0.5)
    plan = planned(request).model_copy(update={"model": f"/models/{ATTACK}"})
    assert isinstance(request.recipe, Recipe)
    recipe = request.recipe.model_copy(update={"model": f"/models/{ATTACK}", "exclude": [ATTACK]})
    data = explorer_data(request, plan, recipe)
    assert data is not None
    data["weights"][0]["names"] = [ATTACK]
    write_page(tmp_path / "plan.html", recipe, plan, request.spectra or {}, data)
    text = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and text.count("</script>") == 2
    block = text.split('id="explorer-data">')[1].split("</script>")[0]
    assert json.loads(block)["weights"][0]["names"] == [ATTACK]


def test_what_is_embedded_can_end_no_element() -> None:
    assert not set("<>&\u2028") & set(embedded({"name": "</script>&\u2028<!--"}))


@pytest.mark.parametrize("language", ["en", "es"])
def test_the_page_of_a_plan_makes_no_request(tmp_path: Path, language: str) -> None:
    request = request_for(1, keep=0.5)
    assert isinstance(request.recipe, Recipe) and request.spectra is not None
    plan = planned(request)
    some = {name: values for name, values in request.spectra.items() if "layers.1" in name}
    beside = Beside(dict.fromkeys(("plain", "inputs", "both"), some), {8: 1e-4, 4: 1e-2})
    data = explorer_data(request, plan, request.recipe, beside)
    path = tmp_path / "plan.html"
    write_page(path, request.recipe, plan, request.spectra, data, words=Words(language))
    text = path.read_text(encoding="utf-8")
    assert (
        f'<html lang="{language}">' in text and "default-src &#39;none&#39;" in text
    ) or "default-src 'none'" in text
    assert "<link" not in text and "<img" not in text and "@import" not in text
    assert Words(language).say("size.lead") in text
    check_page(path)  # it is one of ours, so it may be written again


def test_a_page_takes_the_place_of_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes.html").write_text("<h1>mine</h1>")
    with pytest.raises(ValueError, match="no page of Twofold"):
        check_page(tmp_path / "notes.html")
    with pytest.raises(ValueError, match="is a folder"):
        check_page(tmp_path)


def test_no_page_plans_anew_where_it_can_not_plan_as_the_program_does() -> None:
    request = request_for(1, keep=0.5, allocate="uniform")
    assert isinstance(request.recipe, Recipe)
    assert explorer_data(request, planned(request), request.recipe) is None


def test_large_models_are_thinned() -> None:
    assert thinned(10, 3).tolist() == [0, 3, 6, 9] and thinned(11, 3).tolist() == [0, 3, 6, 9, 10]
    assert thinned(0, 1).tolist() == [] and MOST > 1


def test_every_message_is_in_both_languages() -> None:
    for key, message in _table().items():
        assert set(message) == {"en", "es"}, key
        assert message["es"].strip(), key
    with pytest.raises(ValueError, match="no language 'fr'"):
        Words("fr")
    assert Words("es").number(1234.5, 5) == "1234,5" and Words("es").count(1234567) == "1.234.567"


@pytest.mark.whole
@pytest.mark.long
def test_a_plan_and_a_run_write_the_same_live_page(checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"calibration": [str(text_file)], "tokens": 320, "window": 32, "keep": 0.6, "eval_windows": 1}
    path = tmp_path / "plan.html"
    plan = twofold.plan(str(checkpoint), html=path, lang="es", quiet=True, **how)
    twofold.compress(str(checkpoint), tmp_path / "out", quiet=True, **how)
    pages = [page.read_text(encoding="utf-8") for page in (path, tmp_path / "out" / "report.html")]
    one, other = (json.loads(page.split('id="explorer-data">')[1].split("</script>")[0]) for page in pages)
    assert one == other
    assert '<html lang="es">' in pages[0] and '<html lang="en">' in pages[1]
    assert set(one["spectra"]) == {"plain", "inputs", "both"} and len(one["weights"]) == len(plan.entries)
    for metric, some in one["spectra"].items():
        for name, spectrum in some.items():
            assert 0 < spectrum["most"] <= spectrum["full"], (metric, name)
            assert spectrum["shares"] == sorted(spectrum["shares"], reverse=True)
    eight, four = one["integers"]
    assert 0 < eight["lost"] < four["lost"] and eight["bytes"] > four["bytes"]


def test_a_page_is_written_of_shapes_alone(checkpoint: Path, tmp_path: Path) -> None:
    twofold.plan(str(checkpoint), keep=0.6, html=tmp_path / "plan.html", estimate=False, quiet=True)
    assert 'id="explorer-data"' not in (tmp_path / "plan.html").read_text(encoding="utf-8")
    with pytest.raises(TwofoldError, match="is a folder; name a file for the page"):
        twofold.plan(str(checkpoint), keep=0.6, html=tmp_path, quiet=True)
