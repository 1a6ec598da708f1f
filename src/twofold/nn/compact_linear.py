"""What the layers that take the place of a dense linear layer have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from twofold.nn.int_matrix import IntLinear


def bare_linear(
    in_features: int, out_features: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear:
    """An ``nn.Linear`` without a bias; on the meta device nothing is initialized, which is slow there."""
    if not torch.empty(0, device=device).is_meta:
        return nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = in_features, out_features
    layer.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
    layer.register_parameter("bias", None)
    return layer


def counted(length: int, device: torch.device | str | None) -> Tensor:  # (length,), int32
    """0, 1, 2, …; on the meta device just its shape, since ``torch.arange`` is slow there."""
    order = torch.empty(length, device=device, dtype=torch.int32)
    return order if order.is_meta else torch.arange(length, device=device, dtype=torch.int32)


class CompactLinear(nn.Module):
    """y = W′x + b with W′ (out, in) kept in fewer than out · in numbers, by ``nn.Linear`` children that ``CHILDREN`` names.

    ``weight`` is a buffer of one element, a guard: a program that does not know the layer finds a weight of the wrong shape in
    the checkpoint and stops, where it would otherwise start from random weights.
    """

    CHILDREN: ClassVar[tuple[str, ...]] = ()
    FORMS: ClassVar[tuple[str, ...]] = ()

    weight: Tensor
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    transposed: bool
    form: str
    bits: int | None = None  # of the children's numbers, where they are integers
    group: int | None = None  # inputs that share a scale; None: all of an output

    def _add_bias_and_guard(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    def _fill_bias_and_guard(self, bias: Tensor | None) -> None:
        """Give a layer that was made on the meta device its own, where gradients are off."""
        self.weight.zero_()
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    @property
    def numbers(self) -> int:
        """The numbers that represent the weight."""
        children = [getattr(self, child) for child in self.CHILDREN]
        return sum(child.in_features * child.out_features for child in children)

    @property
    def quantized_bytes(self) -> int | None:
        """What the children store, scales and all, where they are integers."""
        return None if self.bits is None else sum(getattr(self, child).bytes for child in self.CHILDREN)

    def hold_integers(self, bits: int, group: int | None, **children: IntLinear) -> None:
        """Give the layer children of integers: those that are named, and else empty ones of the same shapes."""
        for name in self.CHILDREN:
            old = getattr(self, name)
            made = children.get(name) or IntLinear(old.out_features, old.in_features, bits, group, old.weight.device)
            if (made.rows, made.columns) != (old.out_features, old.in_features):
                raise ValueError(
                    f"{name} must be {(old.out_features, old.in_features)}, got {(made.rows, made.columns)}"
                )
            setattr(self, name, made)
        self.bits, self.group = bits, group

    @property
    def integer_settings(self) -> dict[str, Any]:
        """What config.json says of the children's integers; nothing if they are none."""
        return {} if self.bits is None else {"bits": self.bits, "group": self.group}

    @property
    def keep(self) -> float:
        """The numbers that represent the weight over out · in."""
        return self.numbers / (self.out_features * self.in_features)

    @property
    def words(self) -> str:
        """What kind of layer it is, for a table."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What config.json says of the layer, beside its shape."""
        raise NotImplementedError

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        """The weight as one matrix, in the layer's dtype or the given one."""
        raise NotImplementedError

    def index_error(self) -> str | None:
        """What is wrong with the integers that were loaded, in words that follow the layer's name; None if nothing is."""
        raise NotImplementedError
