"""Many processes on one model, under an engine that users already run: torchrun, accelerate launch, or a scheduler.

Each process takes its share of the calibration windows and of the decompositions; sums are added up, and files are shared.
Nothing here starts a process.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
N = TypeVar("N", int, float)
PATIENCE = timedelta(days=2)  # one process may work long while the others wait


def join() -> None:
    """Join the processes that a launcher started; do nothing without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not dist.is_available() or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=PATIENCE)
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Say whether this is the process that writes and prints."""
    return rank() == 0


def wait() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def add_up(sums: Iterable[Tensor]) -> None:
    """Add tensors up over all processes, in place."""
    if world() > 1:
        for tensor in sums:
            dist.all_reduce(tensor)


def agree(value: bool) -> bool:
    """Say whether something is true in all processes."""
    if world() == 1:
        return value
    flag = torch.tensor([int(value)])
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def least(value: N) -> N:
    """Return the smallest of a number over all processes."""
    if world() == 1:
        return value
    number = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(number, dist.ReduceOp.MIN)
    return type(value)(number.item())


def same(make: Callable[[], T]) -> T:
    """Make something in the first process and give it to all; if that fails, raise its error in all."""
    if world() == 1:
        return make()
    outcome: list[Any] = [None, None]  # result, error
    if is_main():
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def share(count: int) -> tuple[int, int]:
    """Return this process's part of a number of items: first, last + 1."""
    return -(-count * rank() // world()), -(-count * (rank() + 1) // world())
