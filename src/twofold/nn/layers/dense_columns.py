"""A factored layer that keeps the columns of some inputs dense."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twofold.nn.layers.factored import FactoredLinear, Form, is_order, ordered


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
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        columns: int,
    ) -> None:
        if not 1 <= columns < in_features:
            raise ValueError(
                f"a layer with {in_features} inputs has between 1 and {in_features - 1} dense columns, got {columns}"
            )
        super().__init__(in_features - columns, out_features, rank, form, bias, transposed, device, dtype)
        self.in_features, self.columns = in_features, columns
        self.dense = nn.Linear(columns, out_features, bias=False, device=device, dtype=dtype)
        self.register_buffer("split", torch.arange(in_features, device=device, dtype=torch.int32))

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
        dtype, device = rest.weight.dtype, rest.weight.device
        layer = cls(
            len(split), rest.out_features, rest.rank, rest.form, bias is not None, transposed, "meta", dtype,
            columns=dense.shape[1],
        )  # fmt: skip
        layer = layer.to_empty(device=device)
        layer.load_state_dict(rest.state_dict(), strict=False)
        return layer._fill(bias, dense=dense, split=split)

    @property
    def numbers(self) -> int:
        """The numbers that represent the weight: those of the factors, and m k."""
        return super().numbers + self.out_features * self.columns

    @property
    def words(self) -> str:
        return f"{super().words}, {self.columns} columns dense"

    def index_error(self) -> str | None:
        wrong = super().index_error()
        if wrong is not None or self.split.is_meta:
            return wrong
        if is_order(self.split, self.in_features):
            return None
        return f"split in the checkpoint is no order of its {self.in_features} columns"

    def forward(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        x = ordered(x, self.split)
        y: Tensor = super().forward(x[..., self.columns :]) + self.dense(x[..., : self.columns])
        return y

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        rest = super().to_dense(dtype)
        dense = torch.empty(self.out_features, self.in_features, dtype=rest.dtype, device=rest.device)
        dense[:, self.split.long()] = torch.cat([self.dense.weight.to(rest.dtype), rest], 1)
        return dense
