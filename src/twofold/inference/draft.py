"""A factored layer on its way to the form that it runs in: its two matrices, its order, and exact changes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from twofold.linalg.gauge import gauge_form
from twofold.linalg.metric import working_dtype
from twofold.nn.layers.factored import FactoredLinear, Form, unfolded


@dataclass(frozen=True)
class Draft:
    """The numbers of a ``FactoredLinear``. ``order`` is of the outputs for rows and of the inputs for columns."""

    form: Form
    reduce: Tensor
    expand: Tensor
    order: Tensor | None  # int64
    bias: Tensor | None  # (m,)
    in_features: int
    out_features: int

    @classmethod
    def of(cls, layer: FactoredLinear) -> Draft:
        order = None if layer.order is None else layer.order.long()
        bias = None if layer.bias is None else layer.bias.detach()
        matrices = layer.reduce.weight.detach(), layer.expand.weight.detach()
        return cls(layer.form, *matrices, order, bias, layer.in_features, layer.out_features)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the weight."""
        return self.out_features, self.in_features

    def on_rows(self) -> Draft | None:
        """Return the same product with pivots among its outputs, so that its right factor reads the input as it is.

        It is computed in float64 where the device has it, so that only the rounding of the stored numbers differs. None where no
        such form has bounded coefficients.
        """
        if self.form != "columns" or self.order is None:
            return self
        wide = working_dtype(self.reduce.device)
        gauge = gauge_form(self.expand.to(wide), unfolded(self.reduce.to(wide), self.order), "rows")
        if gauge is None:
            return None
        reduce, expand = gauge.reduce.to(self.reduce), gauge.expand.to(self.reduce)
        return replace(self, form="rows", reduce=reduce, expand=expand, order=gauge.order.long().to(self.reduce.device))

    def with_outputs(
        self,
        take: Tensor,  # (m,): output i of the new layer is output take[i] of this one
    ) -> Draft:
        """Return the layer with its outputs in another order, at no cost when it runs."""
        bias = None if self.bias is None else self.bias[take]
        if self.form == "rows" and self.order is not None:
            return replace(self, order=self.order[take], bias=bias)
        return replace(self, expand=self.expand[take], bias=bias)

    def with_inputs(
        self,
        take: Tensor,  # (n,): input i of the new layer is input take[i] of this one
    ) -> Draft:
        """Return the layer for inputs in another order, at no cost when it runs."""
        if self.form == "columns" and self.order is not None:
            return replace(self, order=take.argsort()[self.order])
        return replace(self, reduce=self.reduce[:, take])

    def in_rising_order(self) -> Draft:
        """Return the layer with pivots, and all others, in the order of the outputs (or inputs): it is read along memory."""
        if self.order is None:
            return self
        rank = len(self.reduce)
        if self.form == "rows":
            pivot = self.order < rank
            first, rest = self.order[pivot], self.order[~pivot] - rank
            place = torch.cat([pivot.nonzero()[:, 0], (~pivot).nonzero()[:, 0]])
            return replace(self, reduce=self.reduce[first], expand=self.expand[rest][:, first], order=place.argsort())
        (pivots, first), (others, rest) = self.order[:rank].sort(), self.order[rank:].sort()
        order = torch.cat([pivots, others])
        return replace(self, reduce=self.reduce[first][:, rest], expand=self.expand[:, first], order=order)

    @property
    def in_order(self) -> bool:
        """Tell whether this is a layer on rows that gives its outputs as they are computed."""
        return self.form == "rows" and self.order is not None and bool((self.order.diff() == 1).all())


def why_not(layer: nn.Module) -> str | None:
    """Say why a layer keeps the form that it has; None if it is a factored layer that can be given another one."""
    if type(layer) is not FactoredLinear:
        return f"{type(layer).__name__} has no other form yet"
    if any(type(getattr(layer, child)) is not nn.Linear for child in layer.CHILDREN):
        return "its factors are not plain linear layers (an adapter, or another program's)"
    weights = [getattr(layer, child).weight for child in layer.CHILDREN]
    if any(type(weight.data) is not Tensor or not weight.is_floating_point() for weight in weights):
        return "its factors are quantized"
    if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in layer.modules()):
        return "other code watches its calls"
    return None
