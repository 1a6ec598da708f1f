"""The record of a run: what was done, what it took, what was measured. Kept as run.json beside the checkpoint."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pydantic
import torch

from twofold.refine import Refined
from twofold.run.search import Probe
from twofold.settings.recipe import Recipe
from twofold.task.quality import Quality
from twofold.version import __version__


class Measured(pydantic.BaseModel, extra="forbid"):
    """The quality of the original and of the factored model on the same windows."""

    text: str
    windows: int
    window: int
    original: dict[str, float | int | None]
    factored: dict[str, float | int | None]

    @classmethod
    def of(cls, text: str, shape: tuple[int, int], original: Quality, factored: Quality) -> Measured:
        return cls(
            text=text, windows=shape[0], window=shape[1], original=original.to_dict(), factored=factored.to_dict()
        )


class Sample(pydantic.BaseModel, extra="forbid"):
    """What both models answer to a prompt, greedily."""

    prompt: str
    original: str
    factored: str


class Machine(pydantic.BaseModel, extra="forbid"):
    """Where the run took place."""

    python: str = platform.python_version()
    torch: str = torch.__version__
    transformers: str = ""
    twofold: str = __version__
    system: str = f"{platform.system()} {platform.machine()}"
    threads: int = 0
    device: str = "cpu"
    dtype: str = "float32"


class Run(pydantic.BaseModel, extra="forbid"):
    """A whole run."""

    recipe: Recipe
    machine: Machine
    calibration: str  # in words
    calibration_tokens: int
    calibration_sha256: str
    fingerprint: str
    moments_reused: bool
    keep: float
    keep_model: float
    parameters_before: int
    parameters_after: int
    target_before: int
    target_after: int
    bytes_before: int
    bytes_after: int
    predicted_divergence: float | None
    probes: list[Probe] = []  # what was measured in the search for the size, where a quality was asked for
    refinement: list[Refined] = []
    quality: Measured | None = None
    samples: list[Sample] = []
    seconds: dict[str, float] = {}
    peak_memory: int = 0  # bytes, resident
    notes: list[str] = []


class Stopwatch:
    """Seconds of each stage by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self._start


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    with suppress(OSError, ValueError, StopIteration):
        # Linux: that of getrusage counts what the program that started this one had, too.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """This machine."""
    import transformers

    return Machine(
        transformers=transformers.__version__,
        threads=torch.get_num_threads(),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
    )
