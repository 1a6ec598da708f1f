"""This machine, its memory, and what a stage takes in seconds."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pydantic
import torch

from twofold.version import __version__


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
    """Return the largest resident memory of this process so far, in bytes."""
    with suppress(OSError, ValueError, StopIteration):
        # Linux, where getrusage also counts what the parent process had.
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
    """Describe this machine and what it computes with."""
    import transformers

    return Machine(
        transformers=transformers.__version__,
        threads=torch.get_num_threads(),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
    )


def processor(device: torch.device) -> str:
    """Return the name of the processor or accelerator."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return name if device.type == "cpu" else f"{name} {device.type}"


def return_memory() -> None:
    """Hand what was freed back to the system.

    glibc keeps it for later, in pieces that the next block's tensors do not fit in, so that the memory would grow with the
    number of blocks. Other libraries have no such function.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
