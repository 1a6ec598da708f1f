"""What people notice first: the command alone, completion by the shell, tables that cut no name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import twofold.cli
from twofold.cli import tables

NAME = "model.language_model.encoder.layers.10.self_attn.q_projection_weight"
ROW = [
    NAME,
    "576 × 576",
    "200",
    "dense: at this budget every rank that saves numbers would lose more here than elsewhere",
]


def completed(words: str, place: int) -> list[str]:
    """Return what bash is told for a command line, with the cursor in the word at a place."""
    code = "import sys; sys.argv = ['twofold']; from twofold.cli import main; main()"
    asked = {"_TWOFOLD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_command_alone_says_what_to_do_next(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["twofold"])
    with pytest.raises(SystemExit) as stop:
        twofold.cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert not stop.value.code and len(lines) <= 15
    commands = [line.split("#")[0].split() for line in lines if line.startswith("  twofold")]
    assert [command[1] for command in commands] == ["plan", "compress", "chat"]
    assert all(command[2] in ("smollm2", "small") for command in commands)
    assert any("twofold --help" in line for line in lines)


def test_a_shell_completes_commands_and_flags():
    assert completed("twofold co", 1) == ["compress", "compare"]
    assert completed("twofold plan --ef", 2) == ["--effort"]


def test_a_shell_completes_the_words_of_a_choice():
    assert completed("twofold plan m --effort b", 4) == ["balanced", "best"]


def test_no_name_is_cut_where_no_terminal_is(capsys):
    tables.table("Plan", ["weight", "shape", "rank", "why"], [ROW])
    assert NAME in capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 100, 140])
def test_no_name_is_cut_in_a_terminal(width, monkeypatch, capsys):
    monkeypatch.setattr(
        tables, "console", tables._Console(width=width, force_terminal=True, no_color=True, color_system=None)
    )
    tables.table("Plan", ["weight", "shape", "rank", "why"], [ROW])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width and "…" not in out
    cells = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert "".join(cells) == NAME and (NAME in out) == (width == 140)
