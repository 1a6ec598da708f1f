"""A basis for the inputs of several layers, which the model stores once."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from twofold.nn.compact import Compact, Factory, check_size, counted
from twofold.nn.layers.factored import order_error, ordered, stored_factors, unfolded

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
        self, name: str, in_features: int, rank: int, form: SharedForm = "shared-plain", **factory: Unpack[Factory]
    ) -> None:
        super().__init__()
        self.check_form(form)
        columns = form == "shared-columns"
        words = f"the rank of a shared basis of {in_features} inputs in the form {form} must be"
        check_size(rank, in_features - columns, words)
        self.name, self.in_features, self.rank = name, in_features, rank
        self.form: SharedForm = form
        inner = in_features - rank if columns else in_features
        self.reduce = nn.Linear(inner, rank, bias=False, **factory)
        self.register_buffer("order", counted(in_features, self.reduce.weight.device) if columns else None)

    @classmethod
    def from_factors(
        cls,
        name: str,
        left: Tensor,  # (m, r), the rows of all layers
        right: Tensor,  # (r, n)
        form: Literal["auto", "plain"] = "auto",
        dtype: torch.dtype | None = None,
    ) -> tuple[SharedBasis, Tensor]:
        """Build the basis, and the coefficients (m, r) of all layers on it.

        "auto" takes shared-columns if its coefficients are bounded, else shared-plain; ``dtype`` is that of the stored numbers.
        """
        n = right.shape[1]
        gauge, left, right, order = stored_factors(left, right, "plain" if form == "plain" else "columns")
        stored: SharedForm = "shared-plain" if gauge == "plain" else "shared-columns"
        basis = cls(name, n, left.shape[1], stored, device="meta", dtype=dtype or left.dtype)
        return basis.fill(left.device, reduce=right, order=order), left

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
        if self.order is None:
            return self.reduce(x)  # type: ignore[no-any-return]
        x = ordered(x, self.order)
        return x[..., : self.rank] + self.reduce(x[..., self.rank :])  # type: ignore[no-any-return]

    @torch.no_grad()
    def matrix(self, dtype: torch.dtype) -> Tensor:  # (r, n)
        """Return B, in the given dtype."""
        reduce = self.reduce.weight.to(dtype)
        return reduce if self.order is None else unfolded(reduce, self.order)

    def index_error(self) -> str | None:
        return order_error("order", self.order, self.in_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, rank={self.rank}, form={self.form}"


def basis_storage(form: SharedForm, in_features: int, rank: int) -> int:
    """Count the numbers that a basis stores: r n, or r(n − r) with r of the inputs in themselves."""
    return rank * (in_features if form == "shared-plain" else in_features - rank)
