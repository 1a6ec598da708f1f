"""A linear layer whose weight is a product of two smaller matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from twofold.linalg.gauge import gauge_form, gauge_storage, plain_storage
from twofold.linalg.metric import working_dtype
from twofold.nn.compact import CompactLinear, Place, check_size, counted, unfilled

Form = Literal["plain", "rows", "columns"]


class FactoredLinear(CompactLinear):
    """y = W′x + b with W′ (out, in) of rank r, kept as two ``nn.Linear`` children, ``reduce`` and ``expand``.

    The children are ordinary linear layers, so quantizers, adapters and exporters handle them with no code of ours.
    Three forms hold the same kind of product (section 1 of docs/design.md):

    - plain:   W′ = expand · reduce, r(m + n) numbers;
    - rows:    r outputs are computed by ``reduce`` (r, n), the other outputs from them by ``expand`` (m − r, r);
    - columns: ``reduce`` (r, n − r) folds the other inputs into r of them, ``expand`` (m, r) gives the output.

    The last two store r(m + n − r) numbers and an integer ``order``.

    Args:
        in_features, out_features: n and m.
        rank: r, between 1 and min(m, n); below m for rows and below n for columns.
        form: "plain", "rows" or "columns".
        place: ``bias``, ``transposed``, ``device`` and ``dtype``.

    >>> import torch
    >>> layer = FactoredLinear(8, 6, rank=3, form="rows")
    >>> layer(torch.randn(2, 8)).shape
    torch.Size([2, 6])
    """

    KIND = "factored"
    CHILDREN: ClassVar[tuple[str, ...]] = ("reduce", "expand")
    FORMS = ("plain", "rows", "columns")
    NUMBERS: ClassVar[Mapping[str, str]] = {"rank": "its rank"}

    form: Form
    order: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, rank: int, form: Form = "plain", **place: Unpack[Place]
    ) -> None:
        super().__init__(in_features, out_features, form, **place)
        largest = min(in_features - (form == "columns"), out_features - (form == "rows"))
        check_size(
            rank, largest, f"the rank of a factored layer ({out_features}, {in_features}) in the form {form} must be"
        )
        self.rank, self.factored_inputs = rank, in_features
        (_, inner), (outer, _) = factor_shapes(form, out_features, in_features, rank)
        self.reduce, self.expand = self.child(inner, rank), self.child(rank, outer)
        permuted = {"plain": 0, "rows": out_features, "columns": in_features}[form]
        self.register_buffer("order", counted(permuted, self.weight.device) if permuted else None)

    @classmethod
    def from_factors(
        cls,
        left: Tensor,  # (m, r)
        right: Tensor,  # (r, n)
        bias: Tensor | None = None,  # (m,)
        form: Literal["auto", "plain", "rows", "columns"] = "auto",
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> FactoredLinear:
        """Build the layer from two factors; "auto" takes the gauge form if its coefficients are bounded, else plain.

        ``dtype`` is that of the stored numbers (the factors' own by default); give the factors in float64 if you can, since
        the gauge is fixed in theirs.
        """
        (m, r), n = left.shape, right.shape[1]
        stored, expand, reduce, order = stored_factors(left, right, form)
        layer = cls(n, m, r, stored, **unfilled(bias, transposed, dtype or left.dtype))
        return layer.fill(left.device, bias=bias, reduce=reduce, expand=expand, order=order)

    @property
    def numbers(self) -> int:
        """The numbers that represent the weight: r(m + n) or r(m + n − r)."""
        count = plain_storage if self.form == "plain" else gauge_storage
        return count(self.out_features, self.factored_inputs, self.rank)

    @property
    def words(self) -> str:
        return f"factored, {self.form}, rank {self.rank}" + (f", {self.bits} bits" if self.bits else "")

    def index_error(self) -> str | None:
        length = self.out_features if self.form == "rows" else self.factored_inputs
        return order_error("order", self.order, length, self.form)

    def product(
        self,
        x: Tensor,  # (..., n): n are the inputs that are factored
    ) -> Tensor:  # (..., out)
        if self.order is None:
            return self.expand(self.reduce(x))  # type: ignore[no-any-return]
        if self.form == "rows":
            pivots = self.reduce(x)
            return ordered(torch.cat([pivots, self.expand(pivots)], -1), self.order)
        x = ordered(x, self.order)
        return self.expand(x[..., : self.rank] + self.reduce(x[..., self.rank :]))  # type: ignore[no-any-return]

    def factors(
        self, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:  # (m, r), (r, n): n as for ``product``
        """Return the two factors in any of the forms, in the given dtype or the widest of the device."""
        dtype = dtype or working_dtype(self.weight.device)
        reduce, expand = self.reduce.weight.detach().to(dtype), self.expand.weight.detach().to(dtype)
        if self.order is None:
            return expand, reduce
        if self.form == "rows":
            identity = torch.eye(self.rank, dtype=dtype, device=reduce.device)
            return torch.cat([identity, expand]).index_select(0, self.order), reduce
        return expand, unfolded(reduce, self.order)

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        """Return the weight as one matrix, multiplied in float64 where the device has it."""
        wide = working_dtype(self.weight.device)
        reduce, expand = self.reduce.weight.to(wide), self.expand.weight.to(wide)
        dense = expand @ reduce
        if self.order is not None and self.form == "rows":
            dense = torch.cat([reduce, dense]).index_select(0, self.order)
        elif self.order is not None:
            dense = in_places(torch.cat([expand, dense], 1), self.order)
        return dense.to(dtype or self.weight.dtype)


def unfolded(
    reduce: Tensor,  # (r, n − r)
    order: Tensor,  # (n,), the r inputs that stand for themselves first
) -> Tensor:  # (r, n)
    """Return the right factor of a gauge form on columns."""
    identity = torch.eye(len(reduce), dtype=reduce.dtype, device=reduce.device)
    return in_places(torch.cat([identity, reduce], 1), order)


def in_places(columns: Tensor, order: Tensor) -> Tensor:
    """Return columns in the places that an order takes them from: what ``ordered`` does, taken back."""
    whole = torch.empty_like(columns)
    whole[:, order.long()] = columns
    return whole


def stored_factors(
    left: Tensor,  # (m, r)
    right: Tensor,  # (r, n)
    form: Literal["auto", "plain", "rows", "columns"],
) -> tuple[Form, Tensor, Tensor, Tensor | None]:
    """Return the form of two factors, and what is stored of them: the gauge form if its coefficients are bounded, else plain.

    Returns:
        The form, ``expand``, ``reduce``, and the order of a gauge form.
    """
    gauge = None if form == "plain" else gauge_form(left, right, form)
    if gauge is None:
        return "plain", *balanced(left, right), None
    return gauge.form, gauge.expand, gauge.reduce, gauge.order


def factor_shapes(
    form: str, out_features: int, in_features: int, rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:  # of reduce and of expand, (rows, columns)
    """Return the shapes of the two stored matrices."""
    inner = in_features - rank if form == "columns" else in_features
    outer = out_features - rank if form == "rows" else out_features
    return (rank, inner), (outer, rank)


def balanced(
    left: Tensor,  # (m, r)
    right: Tensor,  # (r, n)
) -> tuple[Tensor, Tensor]:
    """Share the scale of a product between its factors, so that neither overflows a narrow dtype."""
    balance = (left.norm(dim=0) / right.norm(dim=1).clamp_min(1e-30)).clamp(1e-30, 1e30).sqrt()
    return left / balance, right * balance[:, None]


def is_order(order: Tensor, length: int) -> bool:
    """Say whether a tensor holds each of the integers below ``length`` once."""
    whole = torch.arange(length, device=order.device)
    fits = not order.is_floating_point() and order.shape == whole.shape
    return fits and torch.equal(order.sort().values.long(), whole)


def order_error(name: str, order: Tensor | None, length: int, sides: str = "columns") -> str | None:
    """Say what is wrong with an order that was loaded; no permutation would read beyond the layer, or leave a part out."""
    if order is None or order.is_meta or is_order(order, length):
        return None
    return f"{name} in the checkpoint is no order of its {length} {sides}"


class _Order(torch.autograd.Function):
    """``index_select`` by a permutation, whose gradient is one by the inverse; PyTorch would add rows up one after another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor) -> Tensor:
        # No view: some models clamp what a projection gives in place, which autograd forbids on a view that is made here.
        y: Tensor = torch.ops.aten._unsafe_view(x.reshape(-1, x.shape[-1]).index_select(1, order), x.shape)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, x: Tensor, order: None) -> Tensor:
        return x.index_select(-1, *ctx.saved_tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return _taken(gradient, order.argsort()), None


def ordered(x: Tensor, order: Tensor) -> Tensor:
    """Order the last dimension. Where no gradient is asked for it is the plain operation, so that exporters know it."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if torch.is_grad_enabled() and x.requires_grad and not tracing:
        y: Tensor = _Order.apply(x, order)  # type: ignore[no-untyped-call]
        return y
    return x.index_select(-1, order) if tracing else _taken(x, order)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Select on the last dimension by way of a matrix: PyTorch takes several times as long for more dimensions."""
    return x.reshape(-1, x.shape[-1]).index_select(1, order).view(x.shape)
