"""A linear layer whose weight is integers, with a correction of low rank."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from twofold.linalg.metric import working_dtype
from twofold.nn.compact import Place, check_size, unfilled
from twofold.nn.int_matrix import IntLinear
from twofold.nn.layers.factored import balanced
from twofold.nn.layers.quantized import QuantizedLinear


class CorrectedLinear(QuantizedLinear):
    """y = Qx + A(Bx) + b: integers Q (out, in) and a correction A B of rank r, two ``nn.Linear`` named ``expand`` and ``reduce``.

    Args:
        rank: r, between 1 and min(m, n); the others are those of ``QuantizedLinear``.

    >>> import torch
    >>> CorrectedLinear(8, 6, bits=4, group=None, rank=2)(torch.randn(2, 8)).shape
    torch.Size([2, 6])
    """

    KIND = "corrected"
    CHILDREN = ("inner", "reduce", "expand")
    FORMS = ("corrected",)
    NUMBERS = {"rank": "its rank"}

    def __init__(
        self, in_features: int, out_features: int, bits: int, group: int | None, *, rank: int, **place: Unpack[Place]
    ) -> None:
        super().__init__(in_features, out_features, bits, group, **place)
        shape = out_features, in_features
        check_size(rank, min(shape), f"the rank of a correction of {shape} must be")
        self.rank = rank
        self.reduce, self.expand = self.child(in_features, rank), self.child(rank, out_features)

    @classmethod
    def correct(
        cls,
        inner: IntLinear,  # (m, n)
        left: Tensor,  # (m, r)
        right: Tensor,  # (r, n)
        bias: Tensor | None = None,  # (m,)
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> CorrectedLinear:
        """Build the layer from its integers and the factors of the correction, stored in ``dtype``."""
        place = unfilled(bias, transposed, dtype, inner.codes.device)
        layer = cls(inner.columns, inner.rows, inner.bits, inner.group, rank=left.shape[1], **place)
        left, right = balanced(left, right)
        layer.fill(inner.codes.device, bias=bias, expand=left, reduce=right)
        layer.inner = inner
        return layer

    @property
    def quantized_bytes(self) -> int:
        """What the integers store, and the correction in its dtype."""
        size = self.expand.weight.element_size()
        return self.inner.bytes + size * self.rank * (self.in_features + self.out_features)

    @property
    def words(self) -> str:
        return f"{super().words} with a correction of rank {self.rank}"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) + self.expand(self.reduce(x))
        return y

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        wide = working_dtype(self.weight.device)
        whole = self.inner.weight.to(wide) + self.expand.weight.to(wide) @ self.reduce.weight.to(wide)
        return whole.to(dtype or self.weight.dtype)
