"""What a layer in vLLM stores for its shards: each kind of tensor of all shards in one parameter, one shard after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.nn.layers.factored import is_order
from twofold.vllm_plugin.shards import Shard, shard_index


@dataclass
class Store:
    """Where each shard's tensor of one kind lies in a flat parameter, and which of them have come.

    Args:
        kind: its name in the checkpoint: reduce.weight, expand.weight, order or weight.
        shards: of the layer.
        shapes: one for each shard; () for one that has none.
        sequence: the shards in the order that they lie in.
    """

    kind: str
    shards: Sequence[Shard]
    shapes: Sequence[tuple[int, ...]]
    sequence: Sequence[int]
    starts: dict[int, int] = field(default_factory=dict)
    size: int = 0
    arrived: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for index in self.sequence:
            if self.shapes[index]:
                self.starts[index] = self.size
                self.size += prod(self.shapes[index])

    def parameter(self, dtype: torch.dtype) -> nn.Parameter:  # (size,), at least of one element
        """An empty parameter with the loader that vLLM calls; on the default device, as vLLM makes its own."""
        parameter = nn.Parameter(torch.zeros(max(self.size, 1), dtype=dtype), requires_grad=False)
        parameter.weight_loader = self.load  # type: ignore[attr-defined]
        return parameter

    def load(self, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        """Copy a tensor of the checkpoint to its place; the signature is that of vLLM's weight loaders.

        Raises:
            TwofoldError: if it has another shape than config.json says, or belongs to no shard.
        """
        index = shard_index(loaded_shard_id, self.shards)
        shard, shape = self.shards[index], self.shapes[index]
        name, found = f"{shard.name}.{self.kind}", tuple(loaded_weight.shape)
        if not shape and self.kind == "weight" and found == (1,):
            return  # the guard of a factored layer
        if not shape or found != shape:
            expected = f"its config.json says {shape}" if shape else "its config.json says that there is none"
            raise TwofoldError(
                f"size mismatch: {name} in the checkpoint is {found}, {expected}; fetch the checkpoint again"
            )
        if self.kind == "order" and not is_order(loaded_weight, shape[0]):
            raise TwofoldError(f"{name} in the checkpoint is no order of its {shape[0]} {shard.form}; fetch it again")
        self.view(param.data, index).copy_(loaded_weight)
        self.arrived.add(index)

    def view(self, flat: Tensor, index: int) -> Tensor:
        """A shard's tensor in the flat one, without a copy."""
        shape = self.shapes[index]
        return flat.narrow(0, self.starts[index], prod(shape)).view(shape)

    def missing(self) -> list[str]:
        """The tensors that have not come."""
        return [f"{self.shards[i].name}.{self.kind}" for i in sorted(self.starts.keys() - self.arrived)]


class Factor(nn.Module):
    """The module that vLLM finds by the name ``reduce`` or ``expand`` when it loads ``….reduce.weight``."""

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.register_parameter("weight", weight)


class Stores:
    """The four kinds of tensors of a layer's shards: both factors, the orders, and the weights of dense shards."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        places = list(range(len(shards)))
        first = sorted(places, key=lambda i: not shards[i].reads_input)  # so that their right factors lie as one matrix
        self.reduce = self._store("reduce.weight", lambda shard: shard.reduce, first)
        self.expand = self._store("expand.weight", lambda shard: shard.expand, places)
        self.order = self._store("order", lambda shard: (shard.order,), places)
        self.weight = Store(
            "weight", self.shards, [() if s.rank else (s.outputs, s.inputs) for s in self.shards], places
        )

    def _store(self, kind: str, shape: Callable[[Shard], tuple[int, ...]], sequence: Sequence[int]) -> Store:
        return Store(kind, self.shards, [shape(s) if prod(shape(s)) else () for s in self.shards], sequence)

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
        if missing:
            raise TwofoldError(
                f"the checkpoint is not whole: it lacks {len(missing)} tensors of one layer, first {missing[0]}; fetch it again "
                "(vLLM's --load-format must be one that reads safetensors by name)"
            )
