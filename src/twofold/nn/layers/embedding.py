"""An input embedding kept in integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from twofold.nn.compact import Compact, Factory, integers_of
from twofold.nn.int_matrix import IntMatrix


class QuantizedEmbedding(Compact):
    """Rows of a table (count, width) by token id; the table is an ``IntMatrix`` child named ``table``.

    The guard ``weight`` also tells the dtype of the rows.

    >>> import torch
    >>> QuantizedEmbedding(10, 6, bits=8, group=None)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 6])
    """

    KIND = "embedding"
    CHILDREN = ("table",)
    FORMS = ("embedding",)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group: int | None,
        padding_idx: int | None = None,
        **factory: Unpack[Factory],
    ) -> None:
        super().__init__()
        self.form, self.bits, self.group = self.FORMS[0], bits, group
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.register_buffer("weight", torch.zeros(1, **factory))
        self.table = IntMatrix(num_embeddings, embedding_dim, bits, group, self.weight.device)

    @property
    def words(self) -> str:
        return f"embedding, {self.bits} bits"

    @property
    def shape(self) -> list[int]:
        return [self.num_embeddings, self.embedding_dim]

    @property
    def numbers(self) -> int:
        return self.table.numbers

    @classmethod
    def empty(cls, module: nn.Module, settings: Mapping[str, Any], model: nn.Module, shared: dict[str, Any]) -> Self:
        cls.read(settings)
        if type(module) is not nn.Embedding:
            raise ValueError(f"it is no embedding but a {type(module).__name__}")
        (count, width), (bits, group) = module.weight.shape, integers_of(settings)
        device, dtype = module.weight.device, module.weight.dtype
        return cls(count, width, bits, group, module.padding_idx, device=device, dtype=dtype)

    def forward(
        self,
        ids: Tensor,  # (...)
    ) -> Tensor:  # (..., width)
        return self.table.rows_at(ids).to(self.weight.dtype)

    def dense_module(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        weight = self.table.weight.to(dtype or self.weight.dtype)
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=weight)
