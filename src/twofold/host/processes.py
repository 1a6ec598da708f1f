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
PATIENCE = timedelta(days=2)  # one process may work long while the others wait


def join() -> None:
    """Join the processes that a launcher started; does nothing without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not dist.is_available() or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=PATIENCE)
    atexit.register(leave)


def leave() -> None:
    """Part from the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
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
    """Whether a thing is so for all processes."""
    if world() == 1:
        return value
    flag = torch.tensor([int(value)])
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def least(value: float) -> Any:
    """The smallest of a number over all processes."""
    if world() == 1:
        return value
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return type(value)(found.item())


def same(make: Callable[[], T]) -> T:
    """What the first process makes, given to all; if it fails, its error is raised in all."""
    if world() == 1:
        return make()
    made: list[Any] = [None, None]
    if is_main():
        try:
            made[0] = make()
        except Exception as error:
            made[1] = error
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return made[0]  # type: ignore[no-any-return]


def share(count: int) -> tuple[int, int]:
    """This process's part of a count of things, first … last − 1."""
    return -(-count * rank() // world()), -(-count * (rank() + 1) // world())
