"""A linear layer at full rank whose weight is integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from twofold.nn.compact import CompactLinear, Place, integers_of, linear_shape, place_of, unfilled
from twofold.nn.int_matrix import IntLinear


class QuantizedLinear(CompactLinear):
    """y = Qx + b with Q (out, in) in integers, an ``IntLinear`` child named ``inner``.

    Args:
        in_features, out_features: n and m.
        bits, group: of the integers, as ``IntMatrix`` has them.
        place: ``bias``, ``transposed``, ``device`` and ``dtype``.

    >>> import torch
    >>> QuantizedLinear(8, 6, bits=4, group=None)(torch.randn(2, 8)).shape
    torch.Size([2, 6])
    """

    KIND = "quantized"
    CHILDREN: ClassVar[tuple[str, ...]] = ("inner",)
    FORMS: ClassVar[tuple[str, ...]] = ("dense",)

    def __init__(
        self, in_features: int, out_features: int, bits: int, group: int | None, **place: Unpack[Place]
    ) -> None:
        super().__init__(in_features, out_features, self.FORMS[0], **place)
        self.bits, self.group = bits, group
        self.inner = IntLinear(out_features, in_features, bits, group, self.weight.device)

    @classmethod
    def empty(cls, module: nn.Module, settings: Mapping[str, Any], model: nn.Module, shared: dict[str, Any]) -> Self:
        numbers: dict[str, Any] = cls.read(settings)
        (in_features, out_features), (bits, group) = linear_shape(module), integers_of(settings)
        return cls(in_features, out_features, bits, group, **numbers, **place_of(module))

    @classmethod
    def around(
        cls,
        inner: IntLinear,  # (m, n)
        bias: Tensor | None = None,  # (m,)
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """Build the layer from its integers; ``dtype`` is that of the bias and of the guard."""
        layer = cls(inner.columns, inner.rows, inner.bits, inner.group, **unfilled(bias, transposed, dtype))
        layer.fill(inner.codes.device, bias=bias)
        layer.inner = inner
        return layer

    @property
    def words(self) -> str:
        return f"dense, {self.bits} bits"

    def product(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        return self.inner.weight.to(dtype or self.weight.dtype)
