"""A factored layer that keeps the columns of some inputs dense."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from twofold.nn.compact import Place, check_size, counted, unfilled
from twofold.nn.layers.factored import FactoredLinear, Form, in_places, order_error, ordered


class DenseColumnsLinear(FactoredLinear):
    """y = W′x_rest + D x_K + b: of low rank in most inputs, as ``FactoredLinear`` in any form, and dense in k of them.

    ``dense`` is an ``nn.Linear`` (m, k), and ``split`` an order of the inputs, those of the dense columns first. Stored are m k
    numbers, and those of a factored layer of the other n − k inputs.

    Args:
        columns: k, between 1 and n − 1; the others are those of ``FactoredLinear``, the rank that of the other inputs.

    >>> import torch
    >>> layer = DenseColumnsLinear(8, 6, rank=2, form="plain", columns=3)
    >>> layer(torch.randn(2, 8)).shape
    torch.Size([2, 6])
    """

    KIND = "dense-columns"
    CHILDREN = ("reduce", "expand", "dense")
    NUMBERS = {"rank": "its rank", "columns": "how many columns are dense"}

    split: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        form: Form = "plain",
        *,
        columns: int,
        **place: Unpack[Place],
    ) -> None:
        check_size(columns, in_features - 1, f"a layer with {in_features} inputs has", " dense columns")
        super().__init__(in_features - columns, out_features, rank, form, **place)
        self.in_features, self.columns = in_features, columns
        self.dense = self.child(columns, out_features)
        self.register_buffer("split", counted(in_features, self.weight.device))

    @classmethod
    def around(
        cls,
        rest: FactoredLinear,  # (m, n − k), without a bias
        dense: Tensor,  # (m, k)
        split: Tensor,  # (n,), the inputs of the dense columns first
        bias: Tensor | None = None,  # (m,)
        transposed: bool = False,
    ) -> DenseColumnsLinear:
        """Build the layer from the factored layer of the other inputs and the dense columns, in the dtype of the former."""
        place = unfilled(bias, transposed, rest.weight.dtype)
        layer = cls(len(split), rest.out_features, rest.rank, rest.form, columns=dense.shape[1], **place)
        factors = {"reduce": rest.reduce.weight, "expand": rest.expand.weight, "order": rest.order}
        return layer.fill(rest.weight.device, bias=bias, dense=dense, split=split, **factors)

    @property
    def numbers(self) -> int:
        """The numbers that represent the weight: those of the factors, and m k."""
        return super().numbers + self.out_features * self.columns

    @property
    def words(self) -> str:
        return f"{super().words}, {self.columns} columns dense"

    def index_error(self) -> str | None:
        return super().index_error() or order_error("split", self.split, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        x = ordered(x, self.split)
        y: Tensor = super().forward(x[..., self.columns :]) + self.dense(x[..., : self.columns])
        return y

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        rest = super().to_dense(dtype)
        return in_places(torch.cat([self.dense.weight.to(rest.dtype), rest], 1), self.split)
