"""Runs of the program in a process of their own, some of them killed, and whether two runs gave the same bits."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from twofold.planning.plan import Plan
from twofold.recipe import Recipe, make_recipe


def recipe_of(checkpoint: Path, text_file: Path, **settings: Any) -> Recipe:
    """Return the recipe of a small run with a refinement."""
    settings = {"keep": 0.4, "tokens": 640, "window": 32, "refine": "distill", "refine_passes": 2, **settings}
    return make_recipe({"model": str(checkpoint), "calibration": [str(text_file)], **settings})


def command(source: Path, text: Path, out: Path, *more: str) -> list[str]:
    """Return the command line of a small run."""
    return [sys.executable, "-m", "twofold", "compress", str(source), "--calibration", str(text), "--tokens", "320",
            "--window", "32", "--keep", "0.6", "--eval-windows", "1", "--out", str(out), *more]  # fmt: skip


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of a run with a cache of its own."""
    return {**os.environ, "TWOFOLD_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


# The program, killed as soon as a file of that name has got its place.
DYING = """
import fnmatch, os, signal, sys
from pathlib import Path
pattern, place = sys.argv.pop(1), Path.replace
def dies(self, target):
    place(self, target)
    if fnmatch.fnmatch(str(target), pattern):
        os.kill(os.getpid(), signal.SIGKILL)
Path.replace = dies
from twofold.cli import main
main()
"""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint."""
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


def same(first: Path, second: Path) -> None:
    """Check that two checkpoints hold the same tensors and the same plan."""
    one, other = tensors(first), tensors(second)
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert Plan.load(first / "plan.json").entries == Plan.load(second / "plan.json").entries
