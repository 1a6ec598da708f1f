"""The README: its commands run, its figures are those that were measured, and both languages say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from guide import Folder, blocks_of, commands
from test_guides import _readers_model as _readers_model

from conftest import TEXT
from twofold.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, SPANISH = ROOT / "README.md", ROOT / "README.es.md"
both = pytest.mark.parametrize("page", [ENGLISH, SPANISH], ids=["en", "es"])


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@both
def test_links_lead_somewhere(page: Path):
    found = re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", text(page))
    assert len(found) > 20
    assert not [link for link in found if not (ROOT / link).is_file()]


def test_both_languages_have_the_same_code_and_figures():
    code = [[block.same_code() for block in blocks_of(text(page))] for page in (ENGLISH, SPANISH)]
    assert code[0] == code[1]
    figures = [sorted(table_figures(page)) for page in (ENGLISH, SPANISH)]
    assert figures[0] == figures[1]


def table_figures(page: Path) -> list[str]:
    """Return the figures in the columns of the table of costs, with a point."""
    rows = [line.split("|")[2:] for line in text(page).splitlines() if line.startswith("|")]
    return [figure.replace(",", ".") for row in rows for figure in re.findall(r"\d+[.,]\d+|\d{4}", " ".join(row))]


def test_the_table_has_what_was_measured():
    """All figures are in the docs but for the ratios of rank and bits together, whose original is named below the table."""
    measured = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    ratios = {f"{x / 30.7:.{digits}f}" for x, digits in ((53.44, 2), (40.89, 2), (2107, 1), (79.60, 2))}
    missing = set(table_figures(ENGLISH)) - ratios - set(re.findall(r"\d+\.\d+|\d+", measured))
    assert not missing, missing
    assert ratios < set(table_figures(ENGLISH)) and "30.7 after" in measured


@pytest.mark.long
def test_five_commands_lead_to_an_own_model(tmp_path: Path, _readers_model: Path, monkeypatch: pytest.MonkeyPatch):
    """The first two blocks are all that a new user runs; what is explored is served until it is stopped."""
    (tmp_path / "model").symlink_to(_readers_model)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "held-out.txt").write_text(TEXT.replace("river", "sea"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks_of(text(ENGLISH))[:2] for line in commands(block.code)]
    assert len(lines) == 5 and lines[0].startswith("pip install") and lines[4].startswith("twofold explore small ")
    with Folder(tmp_path, ENGLISH) as folder:
        for line in lines[1:4]:
            folder.command(line, "README.md")
    assert {"config.json", "report.html"} <= {path.name for path in (tmp_path / "small").iterdir()}
    assert (tmp_path / "plan.html").is_file()
    assert "explore" in COMMANDS


def test_what_checks_a_change_is_what_the_readme_says():
    """Continuous integration runs nothing that a reader of the section Test would not."""
    said = text(ENGLISH).partition("## Test\n")[2]
    run = [line for line in text(ROOT / ".ci" / "run").splitlines() if line.startswith("make ")]
    assert run and all(line in said for line in run)
