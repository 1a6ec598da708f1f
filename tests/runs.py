"""Runs of the program in a process of their own, some of them killed, and whether two runs gave the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from short import shorten
from twofold.cli import main
from twofold.planning.plan import Plan
from twofold.recipe import Recipe, make_recipe
from twofold.refine.steps import training

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["runs", "peft", "transformers.models.llama", "twofold.comparison.arena", "twofold.report.page"]
)


def recipe_of(checkpoint: Path, text_file: Path, **settings: Any) -> Recipe:
    """Return the recipe of a small run with a refinement."""
    settings = {"keep": 0.4, "tokens": 640, "window": 32, "refine": "distill", "refine_passes": 2, **settings}
    return make_recipe({"model": str(checkpoint), "calibration": [str(text_file)], **settings})


def command(source: Path, text: Path, out: Path, *more: str) -> list[str]:
    """Return what follows ``twofold`` on the command line of a small run."""
    return ["compress", str(source), "--calibration", str(text), "--tokens", "320", "--window", "32", "--keep", "0.6",
            "--eval-windows", "1", "--out", str(out), *more]  # fmt: skip


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of a run with a cache of its own."""
    return {**os.environ, "TWOFOLD_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Program:
    """A run of the program in a process of its own.

    It is forked from a server that has loaded the libraries once, as each run would in several seconds.
    """

    def __init__(self, arguments: Sequence[object], cache: Path, dies_at: str | None = None) -> None:
        """
        Args:
            arguments: what follows ``twofold`` on the command line.
            cache: the folder in the place of the user's cache.
            dies_at: kill it as soon as a file whose path matches this pattern has got its place.
        """
        self.arguments, self.folder = [str(argument) for argument in arguments], Path(tempfile.mkdtemp())
        given = (self.arguments, environment(cache), self.folder, dies_at)
        self.process = SERVER.Process(target=_run, args=given, daemon=True)  # type: ignore[attr-defined]
        self.process.start()

    @property
    def told(self) -> str:
        """What it has printed to standard error so far."""
        path = self.folder / "err"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def send(self, sent: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, sent)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end; return its exit code and what it printed."""
        self.process.join(300)
        assert self.process.exitcode is not None, "it still runs after five minutes"
        out, err = ((self.folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
        shutil.rmtree(self.folder)
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, out, err)


def _run(arguments: list[str], environment: dict[str, str], folder: Path, dies_at: str | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    place = Path.replace

    def place_and_die(self: Path, target: Path) -> None:
        place(self, target)
        if fnmatch(str(target), str(dies_at)):
            os.kill(os.getpid(), signal.SIGKILL)

    shorten(pytest.MonkeyPatch().setattr)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a server ignores it
    torch.set_num_threads(1)  # as OMP_NUM_THREADS does for a program that begins
    if dies_at:
        training.SAVE_SECONDS = -1.0  # in every step
        Path.replace = place_and_die  # type: ignore[assignment, method-assign]
    sys.argv = ["twofold", *arguments]
    main()


def run_program(arguments: Sequence[object], cache: Path) -> subprocess.CompletedProcess[str]:
    """Run the program to its end, which must be a good one."""
    done = Program(arguments, cache).wait()
    assert done.returncode == 0, done.stderr
    return done


def kill_program(arguments: Sequence[object], cache: Path, dies_at: str) -> None:
    """Run the program until it is killed at a file."""
    killed = Program(arguments, cache, dies_at).wait()
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint."""
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


def same(first: Path, second: Path) -> None:
    """Check that two checkpoints hold the same tensors and the same plan."""
    one, other = tensors(first), tensors(second)
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert Plan.load(first / "plan.json").entries == Plan.load(second / "plan.json").entries


def as_one(memory: Path, streamed: Path) -> None:
    """Check that both ways wrote the same files, the same tensors and the same plan."""

    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*")} - {
            p.name for p in folder.glob("model*.safetensors*")
        }

    assert files(memory) == files(streamed)
    same(memory, streamed)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        paths = [folder / name for folder in (memory, streamed)]
        if paths[0].exists():
            assert paths[0].read_bytes() == paths[1].read_bytes(), name
    plans = [Plan.load(folder / "plan.json") for folder in (memory, streamed)]
    assert plans[0].model_dump(exclude={"notes"}) == plans[1].model_dump(exclude={"notes"})
    ours = [[note for note in plan.notes if "sample answers" not in note] for plan in plans]
    assert ours[0] == ours[1]
    qualities = [json.loads((folder / "run.json").read_text())["quality"] for folder in (memory, streamed)]
    assert qualities[0] == qualities[1]
