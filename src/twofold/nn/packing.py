"""Integers of 2 to 8 bits, packed without gaps: code i of a row is bits i·b to (i + 1)·b − 1 of its bytes, lowest first."""

from __future__ import annotations

import torch
from torch import Tensor


def row_bytes(columns: int, bits: int) -> int:
    """Count the bytes that a row of codes takes; each row begins with a byte of its own.

    >>> row_bytes(5, 4)
    3
    """
    return -(-columns * bits // 8)


def pack(
    codes: Tensor,  # (rows, columns), each from −2^(bits−1) to 2^(bits−1) − 1
    bits: int,
) -> Tensor:  # (rows, row_bytes(columns, bits)), uint8
    """Pack signed codes; they are stored with 2^(bits−1) added, as numbers from 0."""
    shifted: Tensor = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).contiguous()
    if bits == 8:
        return shifted
    rows, columns = codes.shape
    single = (shifted[..., None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    length = row_bytes(columns, bits)
    flat = single.new_zeros(rows, 8 * length)
    flat[:, : columns * bits] = single.reshape(rows, -1)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    packed: Tensor = (flat.view(rows, length, 8) << places).sum(-1, dtype=torch.uint8)
    return packed


def unpack(
    packed: Tensor,  # (rows, bytes), uint8
    columns: int,
    bits: int,
) -> Tensor:  # (rows, columns), int16
    """Return the signed codes again."""
    rows = len(packed)
    if bits == 8:
        shifted = packed
    elif bits == 4:
        shifted = torch.stack([packed & 15, packed >> 4], -1).view(rows, -1)[:, :columns]
    else:
        single = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
        single = single.view(rows, -1)[:, : columns * bits].reshape(rows, columns, bits)
        shifted = (single << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(-1, dtype=torch.uint8)
    codes: Tensor = shifted.to(torch.int16) - 2 ** (bits - 1)
    return codes
