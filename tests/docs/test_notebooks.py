"""Each notebook runs as it is written, on a tiny Llama and a page of text in the place of the docs that it reads."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from matplotlib import pyplot
from nbclient import NotebookClient
from test_guides import _readers_model as _readers_model

from conftest import TEXT

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def desk(tmp_path: Path, _readers_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a notebook runs in, with docs beside it."""
    folder, docs = tmp_path / "notebooks", tmp_path / "docs"
    folder.mkdir()
    docs.mkdir()
    (docs / "design.md").write_text(TEXT, encoding="utf-8")
    (docs / "troubleshooting.md").write_text(TEXT.replace("river", "sea"), encoding="utf-8")
    monkeypatch.setenv("TWOFOLD_NOTEBOOK_MODEL", str(_readers_model))
    monkeypatch.setenv("TWOFOLD_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(folder)
    return folder


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["compress", "explore", "tune"]


@pytest.mark.long
@each
def test_every_cell_runs(path: Path, desk: Path):
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.name}, cell {number}", "exec"), namespace)
    pyplot.close("all")


@each
def test_it_is_valid_and_holds_nothing_that_a_run_left(path: Path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3" and book.cells[0].source.startswith("# ")
    assert not [cell.id for cell in book.cells if cell.get("outputs") or cell.get("execution_count") is not None]


@pytest.mark.slow
@each
def test_jupyter_runs_it(path: Path, desk: Path):
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(desk)}}).execute()
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")
