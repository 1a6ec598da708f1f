"""Layers whose weight is kept in fewer numbers than a dense one: written by Twofold, and free of any import of it.

A checkpoint in the portable format carries this file. `shrink` puts the layers where its configuration says; the names of their
weights are those in the checkpoint. `weight` is one element: it tells the dtype and the device where a dense layer's would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """What the layers have in common: a bias, and one element named `weight`."""

    bias: nn.Parameter | None

    def __init__(self, out_features: int, bias: bool, **kind: Any) -> None:
        super().__init__()
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, **kind)) if bias else None)
        self.register_buffer("weight", torch.zeros(1, **kind))

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


def order_of(size: int, device: Any) -> Tensor:
    return torch.arange(size, device=device, dtype=torch.int32)


class Factored(Small):
    """Two products: plain, or with some outputs (rows) or inputs (columns) standing for themselves; and some columns dense."""

    order: Tensor
    split: Tensor
    dense: nn.Linear

    def __init__(
        self, inputs: int, outputs: int, bias: bool, rank: int, form: str = "plain", columns: int = 0, **kind: Any
    ) -> None:
        super().__init__(outputs, bias, **kind)
        self.rank, self.form, self.columns = rank, form, columns
        if columns:
            self.dense = nn.Linear(columns, outputs, bias=False, **kind)
            self.register_buffer("split", order_of(inputs, kind["device"]))
        inputs -= columns
        inner = inputs - rank if form == "columns" else inputs
        self.reduce = nn.Linear(inner, rank, bias=False, **kind)
        self.expand = nn.Linear(rank, outputs - rank if form == "rows" else outputs, bias=False, **kind)
        permuted = {"plain": 0, "rows": outputs, "columns": inputs}[form]
        self.register_buffer("order", order_of(permuted, kind["device"]) if permuted else None)

    def forward(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        extra: Tensor | None = None
        if self.columns:
            x = x.index_select(-1, self.split)
            extra, x = self.dense(x[..., : self.columns]), x[..., self.columns :]
        if self.form == "rows":
            pivots = self.reduce(x)
            y = torch.cat([pivots, self.expand(pivots)], -1).index_select(-1, self.order)
        elif self.form == "columns":
            x = x.index_select(-1, self.order)
            y = self.expand(x[..., : self.rank] + self.reduce(x[..., self.rank :]))
        else:
            y = self.expand(self.reduce(x))
        return self.add_bias(y if extra is None else y + extra)


class Sliced(Small):
    """One product with some of the rows or columns; the others are zero."""

    index: Tensor

    def __init__(self, inputs: int, outputs: int, bias: bool, kept: int, form: str, **kind: Any) -> None:
        super().__init__(outputs, bias, **kind)
        self.rows, self.outputs = form == "kept-rows", outputs
        self.inner = nn.Linear(*((inputs, kept) if self.rows else (kept, outputs)), bias=False, **kind)
        self.register_buffer("index", order_of(kept, kind["device"]))

    def forward(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        if not self.rows:
            return self.add_bias(self.inner(x.index_select(-1, self.index)))
        part = self.inner(x)
        return self.add_bias(part.new_zeros(*part.shape[:-1], self.outputs).index_copy(-1, self.index.long(), part))


class Basis(nn.Module):
    """The first product of layers of several blocks, which the model holds once."""

    order: Tensor

    def __init__(self, inputs: int, rank: int, form: str, **kind: Any) -> None:
        super().__init__()
        self.rank, self.columns = rank, form == "shared-columns"
        self.reduce = nn.Linear(inputs - rank if self.columns else inputs, rank, bias=False, **kind)
        self.register_buffer("order", order_of(inputs, kind["device"]) if self.columns else None)

    def forward(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., rank)
        if not self.columns:
            return self.reduce(x)  # type: ignore[no-any-return]
        x = x.index_select(-1, self.order)
        return x[..., : self.rank] + self.reduce(x[..., self.rank :])  # type: ignore[no-any-return]


class Shared(Small):
    """The second product, on a basis that the model holds."""

    def __init__(self, basis: Basis, outputs: int, bias: bool, **kind: Any) -> None:
        super().__init__(outputs, bias, **kind)
        self.link = (basis,)  # in a tuple, which PyTorch does not look into
        self.expand = nn.Linear(basis.rank, outputs, bias=False, **kind)

    def forward(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        return self.add_bias(self.expand(self.link[0](x)))


def shrink(model: Any, modules: dict[str, dict[str, Any]]) -> None:
    """Put a smaller layer in the place of each that is named, in the model that was stored, its base, or one of another head.

    Raises:
        ValueError: if the model has no such layer.
    """
    prefix = f"{model.base_model_prefix}."
    bases: dict[str, Basis] = {}
    present = dict(model.named_modules())
    for stored, settings in modules.items():
        name = stored if stored in present else stored.removeprefix(prefix)
        if name not in present and prefix + stored in present:
            name = prefix + stored
        if name not in present and not stored.startswith(prefix):
            continue  # a part of another head
        if name not in present:
            raise ValueError(f"the configuration makes {stored} smaller, which {type(model).__name__} does not have")
        old, size = present[name], dict(settings)
        outputs, inputs = old.weight.shape if isinstance(old, nn.Linear) else reversed(old.weight.shape)
        kind = {"device": old.weight.device, "dtype": old.weight.dtype}
        bias = old.bias is not None
        layer: nn.Module
        if "basis" in size:
            basis = size.pop("basis")
            if basis not in bases:
                bases[basis] = Basis(inputs, **size, **kind)
            layer = Shared(bases[basis], outputs, bias, **kind)
        elif "kept" in size:
            layer = Sliced(inputs, outputs, bias, **size, **kind)
        else:
            layer = Factored(inputs, outputs, bias, **size, **kind)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    if bases:
        getattr(model, "base_model", model).twofold_bases = nn.ModuleDict(bases)
