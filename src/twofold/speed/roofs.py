"""What this machine can do at the most: bytes a second and multiplications a second, by PyTorch's own products."""

from __future__ import annotations

import torch

from twofold.inference.timing import in_turn
from twofold.speed.record import Roofs

LARGE = 96 * 2**20  # bytes of all matrices that a vector is multiplied with
WIDE = 4096  # columns of one of them
SIDE = 1536  # of a square product


def measure_roofs(dtype: torch.dtype, device: torch.device | str = "cpu", repeats: int = 5) -> Roofs:
    """Time rounds of a product with one vector and of a square product, and return the best of each."""
    rows = LARGE // 4 // (WIDE * dtype.itemsize)
    matrices = [torch.full((rows, WIDE), 0.5, dtype=dtype, device=device) for _ in range(4)]
    vector = torch.ones(1, WIDE, dtype=dtype, device=device)
    square = torch.full((SIDE, SIDE), 0.5, dtype=dtype, device=device)
    with torch.inference_mode():
        functions = [lambda: [vector @ matrix.T for matrix in matrices], lambda: square @ square]
        read, multiplied = in_turn(functions, repeats, device)
    moved = sum(matrix.numel() for matrix in matrices) * dtype.itemsize
    return Roofs(bytes_per_second=moved / min(read), flops=2 * SIDE**3 / min(multiplied))
