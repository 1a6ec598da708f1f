"""A basis for the inputs of several layers, which the model stores once."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from twofold.linalg.gauge import gauge_form
from twofold.nn.compact import Compact
from twofold.nn.layers.factored import balanced, is_order, ordered, unfolded

SharedForm = Literal["shared-plain", "shared-columns"]


class SharedBasis(Compact):
    """z = B x with B (r, n): what several layers read of their inputs, each of its own.

    Two forms, both with one ``nn.Linear``, ``reduce``:

    - shared-plain:   B is ``reduce`` (r, n);
    - shared-columns: r of the inputs go into z one by one, and ``reduce`` (r, n − r) folds the others into them, at r² numbers
      fewer. ``order`` has those r inputs first.

    Args:
        name: of the basis in its model, without dots.
        in_features: n.
        rank: r, between 1 and n; below n for shared-columns.

    >>> import torch
    >>> SharedBasis("q", 8, rank=3, form="shared-columns")(torch.randn(2, 8)).shape
    torch.Size([2, 3])
    """

    CHILDREN = ("reduce",)
    FORMS: ClassVar[tuple[str, ...]] = ("shared-plain", "shared-columns")

    order: Tensor | None

    def __init__(
        self,
        name: str,
        in_features: int,
        rank: int,
        form: SharedForm = "shared-plain",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if form not in self.FORMS:
            raise ValueError(f"the form must be one of {', '.join(self.FORMS)}, got {form!r}")
        columns = form == "shared-columns"
        largest = in_features - columns
        if not 1 <= rank <= largest:
            raise ValueError(
                f"the rank of a shared basis of {in_features} inputs in the form {form} must be between 1 and {largest}, "
                f"got {rank}"
            )
        self.name, self.in_features, self.rank = name, in_features, rank
        self.form: SharedForm = form
        inner = in_features - rank if columns else in_features
        self.reduce = nn.Linear(inner, rank, bias=False, device=device, dtype=dtype)
        self.register_buffer("order", torch.arange(in_features, device=device, dtype=torch.int32) if columns else None)

    @classmethod
    def from_factors(
        cls,
        name: str,
        left: Tensor,  # (m, r), the rows of all layers
        right: Tensor,  # (r, n)
        form: Literal["auto", "plain"] = "auto",
        dtype: torch.dtype | None = None,
    ) -> tuple[SharedBasis, Tensor]:
        """The basis, and the coefficients (m, r) of all layers on it.

        "auto" takes shared-columns if its coefficients are bounded, else shared-plain; ``dtype`` is that of the stored numbers.
        """
        gauge = None if form == "plain" else gauge_form(left, right, "columns")
        if gauge is None:
            left, right = balanced(left, right)
        else:
            left, right = gauge.expand, gauge.reduce
        n = right.shape[1] if gauge is None else len(gauge.order)
        chosen: SharedForm = "shared-plain" if gauge is None else "shared-columns"
        basis = cls(name, n, left.shape[1], chosen, "meta", dtype or left.dtype).to_empty(device=left.device)
        with torch.no_grad():
            basis.reduce.weight.copy_(right)
            if basis.order is not None and gauge is not None:
                basis.order.copy_(gauge.order)
        return basis, left

    @property
    def shape(self) -> list[int]:
        return [self.rank, self.in_features]

    @property
    def numbers(self) -> int:
        """The numbers that represent it: r n or r(n − r)."""
        return self.reduce.weight.numel()

    @property
    def words(self) -> str:
        """What it is, for a table."""
        return f"shared basis, {self.form.removeprefix('shared-')}, rank {self.rank}"

    def forward(
        self,
        x: Tensor,  # (..., n)
    ) -> Tensor:  # (..., r)
        z: Tensor
        if self.order is None:
            z = self.reduce(x)
        else:
            x = ordered(x, self.order)
            z = x[..., : self.rank] + self.reduce(x[..., self.rank :])
        return z

    @torch.no_grad()
    def matrix(self, dtype: torch.dtype) -> Tensor:  # (r, n)
        """B, in the given dtype."""
        reduce = self.reduce.weight.to(dtype)
        return reduce if self.order is None else unfolded(reduce, self.order)

    def index_error(self) -> str | None:
        """What is wrong with the order that was loaded, in words that follow the name of the basis; None if nothing is."""
        if self.order is None or self.order.is_meta or is_order(self.order, self.in_features):
            return None
        return f"order in the checkpoint is no order of its {self.in_features} columns"

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, rank={self.rank}, form={self.form}"


def basis_storage(form: SharedForm, in_features: int, rank: int) -> int:
    """The numbers that a basis stores: r n, or r(n − r) with r of the inputs in themselves."""
    return rank * (in_features if form == "shared-plain" else in_features - rank)
