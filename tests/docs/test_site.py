"""The docs site: links lead somewhere, figures are small and ask for nothing, and all functions are listed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from test_public import IN_MEMORY, NAMED
from twofold.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)#\s]+)[^)\s]*\)")
ELSEWHERE = re.compile(r"""<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=["']?(?:https?:)?//""")
FIGURE_BYTES = 100_000


def links(page: Path) -> list[str]:
    """The places that a page leads to; code is no link."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [link for link in LINK.findall(text) if not link.startswith(("http://", "https://", "mailto:"))]


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_lead_to_what_the_site_has(page: Path):
    for link in links(page):
        place = (page.parent / link).resolve()
        assert place.is_file(), link
        assert DOCS in place.parents, f"{link} is outside of the site"


def test_every_page_has_its_place_in_the_menu():
    def places(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [place for child in children for place in places(child)]  # type: ignore[attr-defined]

    menu = places(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(menu) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_figures_of_guides_are_small_and_ask_for_nothing():
    figures = sorted((DOCS / "guides" / "figures").glob("*.svg"))
    assert {path.name.split(".")[1] for path in figures} == {"en", "es"}
    for path in figures:
        text = path.read_text(encoding="utf-8")
        assert path.stat().st_size <= FIGURE_BYTES, path.name
        assert "<script" not in text and not re.search(r'(?:xlink:)?href="(?!#|data:)', text), path.name


def test_the_page_of_functions_has_every_function():
    listed = re.findall(r"^::: twofold\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    commands = {NAMED.get(name, name) for name in COMMANDS}
    assert set(listed) == {*commands, *IN_MEMORY}  # which test_public.py holds against the package


@pytest.mark.slow
def test_the_site_builds_and_asks_nothing_of_others(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not ELSEWHERE.findall(text), page
        assert ('<html lang="es"' in text) == ("es" in page.relative_to(tmp_path).parts), page
    assert 'id="twofold.factorize"' in (tmp_path / "api.html").read_text(encoding="utf-8")
