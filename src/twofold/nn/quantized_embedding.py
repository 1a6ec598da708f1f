"""An input embedding kept in integers, and the output layer that shares its table."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofold.nn.compact_linear import CompactLinear
from twofold.nn.int_matrix import IntMatrix


class QuantizedEmbedding(nn.Module):
    """Rows of a table (count, width) by token id; the table is an ``IntMatrix`` child named ``table``.

    ``weight`` is a buffer of one element, as ``CompactLinear`` has it: a guard. It also tells the dtype of the rows.

    >>> import torch
    >>> QuantizedEmbedding(10, 6, bits=8, group=None)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 6])
    """

    CHILDREN: ClassVar[tuple[str, ...]] = ("table",)

    weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group: int | None,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.table = IntMatrix(num_embeddings, embedding_dim, bits, group, device)
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @property
    def words(self) -> str:
        """What it is, for a table."""
        return f"embedding, {self.table.bits} bits"

    @property
    def numbers(self) -> int:
        """The codes of the table."""
        return self.table.numbers

    def settings(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {"form": "embedding", "bits": self.table.bits, "group": self.table.group}

    def forward(
        self,
        ids: Tensor,  # (...)
    ) -> Tensor:  # (..., width)
        return self.table.rows_at(ids).to(self.weight.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The embedding that gives the same rows."""
        weight = self.table.weight.to(dtype or self.weight.dtype)
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=weight)

    def index_error(self) -> str | None:
        return None  # the table says it itself


class TiedLinear(CompactLinear):
    """y = Ex + b with E the table of a ``QuantizedEmbedding``, to which it refers, as ``SharedLinear`` to its basis."""

    FORMS = ("tied",)

    def __init__(
        self,
        embedding: QuantizedEmbedding,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.form, self.transposed = "tied", False
        self._link = (embedding,)  # in a tuple, which PyTorch does not look into
        self._add_bias_and_guard(bias, device, dtype)

    @property
    def embedding(self) -> QuantizedEmbedding:
        return self._link[0]

    @property
    def words(self) -> str:
        return "the table of the input embedding"

    def settings(self) -> dict[str, Any]:
        return {"form": self.form}

    def forward(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        y = F.linear(x, self.embedding.table.weight.to(x.dtype))
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        return self.embedding.table.weight.to(dtype or self.weight.dtype)

    def index_error(self) -> str | None:
        return None
