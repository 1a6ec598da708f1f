"""What a layer in vLLM stores for its shards, each kind of tensor in one parameter, and its product with an input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from twofold.checkpoint.loaded import check_missing
from twofold.errors import TwofoldError
from twofold.nn.layers.factored import is_order, ordered
from twofold.vllm_plugin.shards import Shard, shard_index


@dataclass
class Store:
    """The places of the shards' tensors of one kind in a flat parameter, and which of them have come.

    Shards whose right factors take the input as it comes stand first, so that these factors lie as one matrix.
    """

    kind: str  # its name in the checkpoint: reduce.weight, expand.weight, order or weight
    shards: Sequence[Shard]
    starts: dict[int, int] = field(default_factory=dict)
    size: int = 0
    arrived: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for index, shard in sorted(enumerate(self.shards), key=lambda item: not item[1].reads_input):
            if self.kind in shard.shapes:
                self.starts[index] = self.size
                self.size += prod(shard.shapes[self.kind])

    def parameter(self, dtype: torch.dtype) -> nn.Parameter:  # (size,), at least of one element
        """Make an empty parameter with the loader that vLLM calls; on the default device, as vLLM makes its own."""
        parameter = nn.Parameter(torch.zeros(max(self.size, 1), dtype=dtype), requires_grad=False)
        parameter.weight_loader = self.load  # type: ignore[attr-defined]
        return parameter

    def load(self, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        """Copy a tensor of the checkpoint to its place; the signature is that of vLLM's weight loaders.

        Raises:
            TwofoldError: if it has another shape than config.json says, or belongs to no shard.
        """
        index = shard_index(loaded_shard_id, self.shards)
        shard = self.shards[index]
        name, shape, expected = f"{shard.name}.{self.kind}", tuple(loaded_weight.shape), shard.shapes.get(self.kind)
        if expected is None and self.kind == "weight" and shape == (1,):
            return  # the guard of a factored layer
        if shape != expected:
            raise TwofoldError(
                f"size mismatch: {name} in the checkpoint is {shape}, its config.json says "
                f"{expected or 'that there is none'}; fetch the checkpoint again"
            )
        if self.kind == "order" and not is_order(loaded_weight, shape[0]):
            raise TwofoldError(f"{name} in the checkpoint is no order of its {shape[0]} {shard.form}; fetch it again")
        self.view(param.data, index).copy_(loaded_weight)
        self.arrived.add(index)

    def view(self, flat: Tensor, index: int) -> Tensor:
        """Return a shard's tensor in the flat one, without a copy."""
        shape = self.shards[index].shapes[self.kind]
        return flat.narrow(0, self.starts[index], prod(shape)).view(shape)

    def missing(self) -> list[str]:
        """Return the names of the tensors that have not come."""
        return [f"{self.shards[i].name}.{self.kind}" for i in sorted(self.starts.keys() - self.arrived)]


class Factor(nn.Module):
    """The module that vLLM finds by the name ``reduce`` or ``expand`` when it loads ``….reduce.weight``."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Stores:
    """The four kinds of tensors of a layer's shards: both factors, the orders, and the weights of dense shards."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self.reduce, self.expand = Store("reduce.weight", shards), Store("expand.weight", shards)
        self.order, self.weight = Store("order", shards), Store("weight", shards)

    def attach(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Give the layer its parameters, under the names by which vLLM looks for the checkpoint's tensors."""
        layer.reduce = Factor(self.reduce.parameter(dtype))
        layer.expand = Factor(self.expand.parameter(dtype))
        layer.register_parameter("weight", self.weight.parameter(dtype))
        if self.order.size:
            layer.register_parameter("order", self.order.parameter(torch.int32))

    def check_loaded(self) -> None:
        """Refuse a layer of which a part did not come: vLLM itself does not look after quantized models.

        Raises:
            TwofoldError: naming the first one.
        """
        stores = (self.reduce, self.expand, self.order, self.weight)
        missing = [name for store in stores for name in store.missing()]
        hint = " (vLLM's --load-format must be one that reads safetensors by name)"
        check_missing(missing, "tensors of one layer", hint=hint)

    def product(
        self,
        x: Tensor,  # (..., n)
        layer: Any,  # that holds the parameters
        bias: Tensor | None = None,  # (Σ m,)
    ) -> Tensor:  # (..., Σ m)
        """Compute y = [W′₁; W′₂; …] x + b, each W′ as ``FactoredLinear`` has it.

        The right factors of the shards that take the input as it comes lie one below another in memory, and are one product.
        """
        reduce = layer.reduce.weight
        together = [i for i, shard in enumerate(self.shards) if shard.reads_input]
        inner: dict[int, Tensor] = {}
        if together:
            ranks, n = [self.shards[i].rank for i in together], x.shape[-1]
            right = reduce.narrow(0, 0, sum(ranks) * n).view(-1, n)
            inner = dict(zip(together, torch.split(linear(x, right), ranks, -1), strict=True))
        pieces: list[Tensor] = []
        for i, shard in enumerate(self.shards):
            if shard.form == "dense":
                pieces.append(linear(x, self.weight.view(layer.weight, i)))
                continue
            left = self.expand.view(layer.expand.weight, i)
            if shard.form == "columns":
                x_ordered = ordered(x, self.order.view(layer.order, i))
                pivots, rest = x_ordered[..., : shard.rank], x_ordered[..., shard.rank :]
                pieces.append(linear(pivots + linear(rest, self.reduce.view(reduce, i)), left))
                continue
            y = linear(inner[i], left)
            if shard.form == "rows":
                y = ordered(torch.cat([inner[i], y], -1), self.order.view(layer.order, i))
            pieces.append(y)
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        return y if bias is None else y + bias
