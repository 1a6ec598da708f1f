"""Guides are run as they are written: the blocks of a page, one after another, in a folder of its own.

What a block may be:
- ``bash``: its commands. A plain ``twofold …`` runs in this process, anything else in bash, where ``&`` leaves a process
  that is ended with the guide;
- ``python``: run in one namespace a guide;
- any language with ``title="NAME"``: the file NAME is written;
- ``text``: output, mathematics, or a form that nobody runs.
A bash or python block that can't run has ``<!-- not run: REASON -->`` above it. Any other block fails.
"""

from __future__ import annotations

import contextvars
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from twofold.cli import main

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
REASON = re.compile(r"<!-- not run: (\S.*?) -->\s*\Z")
TITLE = re.compile(r'title="([^"]+)"')
RUN = ("bash", "python")
SHELL = re.compile(r"[|<>&;$`(){}]")  # what only a shell understands
BASH_SECONDS = 60


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    title: str | None
    code: str
    line: int
    reason: str | None  # why it is not run

    @property
    def runs(self) -> bool:
        return self.language in RUN and self.title is None and self.reason is None

    def same_code(self) -> tuple[str, str | None, str]:
        """What two languages of a guide have in common: all but comments and what is shown as it comes."""
        lines = [re.sub(r"(^|\s+)#.*", "", line).rstrip() for line in self.code.splitlines()]
        return self.language, self.title, "\n".join(line for line in lines if line)


def blocks_of(page: str) -> list[Block]:
    """Read the blocks of a page.

    Raises:
        ValueError: if a block is none that the tests know, or is said not to run when nobody would run it.
    """
    blocks = []
    for found in FENCE.finditer(page):
        line = page.count("\n", 0, found.start()) + 1
        indent, (language, _, more) = len(found["indent"]), found["info"].strip().partition(" ")
        title, reason = TITLE.search(more), REASON.search(page[: found.start()])
        code = "".join(text[indent:] or "\n" for text in found["code"].splitlines(keepends=True))
        block = Block(language, title and title[1], code, line, reason and reason[1])
        if block.reason is not None and (block.language not in RUN or block.title):
            raise ValueError(f"line {line}: only a bash or python block is said not to run")
        if not (block.title or block.language in (*RUN, "text")):
            raise ValueError(f"line {line}: a block of {language or 'no language'}, which the tests do not know")
        blocks.append(block)
    if page.count("```") != 2 * len(blocks):
        raise ValueError("some blocks are not closed, or have other fences than three backticks on a line of their own")
    return blocks


class Folder:
    """The folder that a guide's blocks run in, with what they have left."""

    def __init__(self, path: Path, page: Path) -> None:
        self.path, self.page = path, page
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.started: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:  # what a command has left behind it with &
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    def run(self, block: Block) -> None:
        """Run a block, or write the file that it is."""
        where = f"{self.page.name}, line {block.line}"
        if block.title:
            (self.path / block.title).write_text(block.code, encoding="utf-8")
        elif block.runs and block.language == "python":
            code = compile("\n" * block.line + block.code, str(self.page), "exec")  # so that a traceback names the line
            exec(code, self.namespace)
        elif block.runs:
            for command in commands(block.code):
                self.command(command, where)

    def command(self, command: str, where: str) -> None:
        """Run one command line, which must end well."""
        words = shlex.split(command, comments=True)
        if words[0] == "twofold" and not SHELL.search(re.sub(r"'[^']*'", "", command)):
            code = in_process([word for arg in words[1:] for word in expanded(arg)])
            assert code == 0, f"{where}: {command!r} ended with {code}"
            return
        process = subprocess.Popen(
            ["bash", "-ec", command], cwd=self.path, env=self.environment, start_new_session=True,
            stdout=(self.path / ".output").open("ab"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.started.append(process)
        code = process.wait(BASH_SECONDS)
        assert code == 0, f"{where}: {command!r} ended with {code}\n{(self.path / '.output').read_text()[-2000:]}"


def commands(code: str) -> Iterator[str]:
    """Yield the command lines of a block: without comments, with continued lines joined."""
    for line in code.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield line.strip()


def expanded(word: str) -> list[str]:
    """Expand a pattern as a shell does."""
    return sorted(map(str, Path().glob(word))) or [word] if re.search(r"[*?\[]", word) else [word]


def in_process(arguments: list[str]) -> int:
    """Run the program; return its exit code."""

    def run() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["twofold", *arguments])
            try:
                main()
            except SystemExit as end:
                return int(end.code or 0)
            return 0

    return contextvars.copy_context().run(run)
