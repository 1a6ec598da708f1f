"""An output layer that shares the table of an input embedding of integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self, Unpack

from twofold.nn.compact import CompactLinear, Factory, linear_shape
from twofold.nn.layers.embedding import QuantizedEmbedding


class TiedLinear(CompactLinear):
    """y = Ex + b with E the table of a ``QuantizedEmbedding``, to which it refers, as ``SharedLinear`` to its basis."""

    KIND = "tied"
    FORMS = ("tied",)
    OTHERS = ()

    def __init__(self, embedding: QuantizedEmbedding, bias: bool = False, **factory: Unpack[Factory]) -> None:
        super().__init__(embedding.embedding_dim, embedding.num_embeddings, "tied", bias, **factory)
        self._link = (embedding,)  # in a tuple, which PyTorch does not look into

    @property
    def embedding(self) -> QuantizedEmbedding:
        return self._link[0]

    @property
    def words(self) -> str:
        return "the table of the input embedding"

    @classmethod
    def empty(cls, module: nn.Module, settings: Mapping[str, Any], model: nn.Module, shared: dict[str, Any]) -> Self:
        cls.read(settings)
        linear_shape(module)  # it must be a linear layer
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(table, QuantizedEmbedding) or module.bias is not None:
            raise ValueError("it shares the table of an input embedding that is not of integers, or has a bias")
        return cls(table, device=module.weight.device, dtype=module.weight.dtype)  # type: ignore[arg-type]

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.table.weight.to(x.dtype))

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        return self.embedding.table.weight.to(dtype or self.weight.dtype)
