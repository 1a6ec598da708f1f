"""A linear layer at full rank whose weight is integers, with or without a correction of low rank."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from twofold.linalg.metric import working_dtype
from twofold.nn.compact_linear import CompactLinear
from twofold.nn.factored_linear import balanced
from twofold.nn.int_matrix import IntLinear


class QuantizedLinear(CompactLinear):
    """y = Qx + b with Q (out, in) in integers, an ``IntLinear`` child named ``inner``.

    Args:
        in_features, out_features: n and m.
        bits, group: of the integers, as ``IntMatrix`` has them.
        bias: whether there is a bias (m,).
        transposed: whether the dense layer that this one replaces keeps its weight as (in, out), as GPT-2's Conv1D does.

    >>> import torch
    >>> QuantizedLinear(8, 6, bits=4, group=None)(torch.randn(2, 8)).shape
    torch.Size([2, 6])
    """

    CHILDREN: ClassVar[tuple[str, ...]] = ("inner",)
    FORMS: ClassVar[tuple[str, ...]] = ("dense",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int | None,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.form, self.transposed = "dense", transposed
        self.bits, self.group = bits, group
        self.inner = IntLinear(out_features, in_features, bits, group, device)
        self._add_bias_and_guard(bias, device, dtype)

    @classmethod
    def around(
        cls,
        inner: IntLinear,  # (m, n)
        bias: Tensor | None = None,  # (m,)
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """Build the layer from its integers; ``dtype`` is that of the bias and of the guard."""
        device = inner.codes.device
        assert inner.bits is not None
        layer = cls(inner.columns, inner.rows, inner.bits, inner.group, bias is not None, transposed, device, dtype)
        layer.inner = inner
        with torch.no_grad():
            layer._fill_bias_and_guard(bias)
        return layer

    @property
    def words(self) -> str:
        return f"dense, {self.bits} bits"

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, **self.integer_settings}

    def forward(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        y: Tensor = self.inner(x)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        return self.inner.weight.to(dtype or self.weight.dtype)

    def index_error(self) -> str | None:
        return None  # the integers say it themselves

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"bias={self.bias is not None}"
        )


class CorrectedLinear(QuantizedLinear):
    """y = Qx + A(Bx) + b: integers Q (out, in) and a correction A B of rank r, two ``nn.Linear`` named ``expand`` and ``reduce``.

    Args:
        rank: r, between 1 and min(m, n); the others are those of ``QuantizedLinear``.

    >>> import torch
    >>> CorrectedLinear(8, 6, bits=4, group=None, rank=2)(torch.randn(2, 8)).shape
    torch.Size([2, 6])
    """

    CHILDREN = ("inner", "reduce", "expand")
    FORMS = ("corrected",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int | None,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int,
    ) -> None:
        super().__init__(in_features, out_features, bits, group, bias, transposed, device, dtype)
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"the rank of a correction of ({out_features}, {in_features}) must be between 1 and "
                f"{min(in_features, out_features)}, got {rank}"
            )
        self.form, self.rank = "corrected", rank
        self.reduce = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)

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
        layer = cls(
            inner.columns, inner.rows, inner.bits, inner.group, bias is not None, transposed, inner.codes.device, dtype,
            rank=left.shape[1],
        )  # fmt: skip
        layer.inner = inner
        left, right = balanced(left, right)
        with torch.no_grad():
            layer.expand.weight.copy_(left)
            layer.reduce.weight.copy_(right)
            layer._fill_bias_and_guard(bias)
        return layer

    @property
    def quantized_bytes(self) -> int:
        """What the integers store, and the correction in its dtype."""
        size = self.expand.weight.element_size()
        return self.inner.bytes + size * self.rank * (self.in_features + self.out_features)

    @property
    def words(self) -> str:
        return f"{super().words} with a correction of rank {self.rank}"

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, **super().settings()}

    def forward(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        y: Tensor = super().forward(x) + self.expand(self.reduce(x))
        return y

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        wide = working_dtype(self.weight.device)
        whole = self.inner.weight.to(wide) + self.expand.weight.to(wide) @ self.reduce.weight.to(wide)
        return whole.to(dtype or self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
