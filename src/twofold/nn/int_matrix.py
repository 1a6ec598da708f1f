"""A matrix kept in integers of a few bits with a scale for each group of inputs, and the linear layer of one."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofold.nn.bits import BITS
from twofold.nn.packing import pack, row_bytes, unpack

Kind = TypeVar("Kind", bound="IntMatrix")


def int_bytes(rows: int, columns: int, bits: int, group: int | None) -> int:
    """Count what a matrix takes: its codes, and a scale of two bytes for each group. All zero points are zero, and not stored.

    >>> int_bytes(10, 100, 4, 64)    # 50 bytes and two scales a row
    540
    """
    return rows * (row_bytes(columns, bits) + 2 * groups(columns, group))


def groups(columns: int, group: int | None) -> int:
    """Count the groups of a row; the last one may be shorter, so any number of inputs (a rank, say) will do."""
    return 1 if group is None else -(-columns // group)


class IntMatrix(nn.Module):
    """W (out, in) = scale · code, with codes of ``bits`` bits, packed, and a scale for each ``group`` of inputs of an output.

    Buffers: ``codes`` (out, bytes of a row), uint8; ``scales`` (out, groups), the bits of bfloat16 as int16, so that a model can
    be cast to any dtype and is stored again with the same scales. ``weight`` is computed from them when it is asked for, in
    float32, exactly: the product of 8 bits and 8 bits. There is no parameter, and nothing to train.

    Args:
        rows, columns: out and in.
        bits: 2 to 8.
        group: None for one scale an output.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self, rows: int, columns: int, bits: int, group: int | None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if bits not in BITS:
            raise ValueError(f"the bits must be between {BITS[0]} and {BITS[-1]}, got {bits!r}")
        if group is not None and group < 1:
            raise ValueError(f"a group must have at least one input, got {group!r}")
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        for name, (shape, dtype) in self.layout.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

    @property
    def layout(self) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """The shape and the dtype of each buffer."""
        codes, scales = row_bytes(self.columns, self.bits), groups(self.columns, self.group)
        return {"codes": ((self.rows, codes), torch.uint8), "scales": ((self.rows, scales), torch.int16)}

    @classmethod
    def of(
        cls: type[Kind],
        codes: Tensor,  # (rows, columns), signed integers
        scales: Tensor,  # (rows, groups), bfloat16
        bits: int,
        group: int | None,
    ) -> Kind:
        """Build it from codes and their scales."""
        rows, columns = codes.shape
        matrix = cls(rows, columns, bits, group, device="meta")
        matrix.codes, matrix.scales = pack(codes, bits), scales.to(torch.bfloat16).contiguous().view(torch.int16)
        return matrix

    @property
    def numbers(self) -> int:
        """The codes that it holds."""
        return self.rows * self.columns

    @property
    def bytes(self) -> int:
        """What it stores, scales and all."""
        return int_bytes(self.rows, self.columns, self.bits, self.group)

    @property
    def weight(self) -> Tensor:  # (rows, columns), float32
        """The matrix itself."""
        return self._dequantize(self.codes, self.scales)

    def rows_at(
        self,
        index: Tensor,  # (...), int64
    ) -> Tensor:  # (..., columns), float32
        """Return some rows of the matrix, as an input embedding looks them up."""
        flat = index.reshape(-1)
        return self._dequantize(self.codes[flat], self.scales[flat]).view(*index.shape, self.columns)

    def _dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        wide = scales.view(torch.bfloat16).float()
        if self.group is not None:
            wide = wide.repeat_interleave(self.group, 1)[:, : self.columns]
        return unpack(codes, self.columns, self.bits) * wide

    def index_error(self) -> str | None:
        """Say what is wrong with the numbers that were loaded, in words that follow a name; None if nothing is."""
        for name, (shape, dtype) in self.layout.items():
            buffer = getattr(self, name)
            if buffer.dtype != dtype or buffer.shape != shape:
                return (
                    f"{name} in the checkpoint is {tuple(buffer.shape)} of {buffer.dtype}, its config.json says {shape} of "
                    f"{dtype}"
                )
        if not self.scales.is_meta and not bool(torch.isfinite(self.scales.view(torch.bfloat16)).all()):
            return "scales in the checkpoint hold NaN or infinity"
        return None

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, bits={self.bits}, group={self.group}"


class _Product(torch.autograd.Function):
    """y = Wx with W from integers, which the backward pass computes anew: kept for it are the integers alone (as in QLoRA)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in)
        matrix: IntMatrix,
    ) -> Tensor:  # (..., out)
        ctx.matrix = matrix
        return F.linear(x, matrix.weight.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any,
        gradient: Tensor,  # (..., out)
    ) -> tuple[Tensor, None]:  # (..., in)
        return gradient @ ctx.matrix.weight.to(gradient.dtype), None


class IntLinear(IntMatrix):
    """y = Wx with W (out, in) in integers. It is computed in the dtype of x, from W in that dtype.

    Gradients pass through to x, and W takes no memory between the forward and the backward pass.

    >>> import torch
    >>> layer = IntLinear(4, 6, bits=4, group=None)
    >>> layer(torch.randn(2, 6)).shape
    torch.Size([2, 4])
    """

    @property
    def in_features(self) -> int:
        return self.columns

    @property
    def out_features(self) -> int:
        return self.rows

    def forward(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)  # type: ignore[no-any-return,no-untyped-call]
        return F.linear(x, self.weight.to(x.dtype))
