"""A linear layer whose weight is a product of two smaller matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from twofold.linalg.gauge import gauge_form, gauge_storage, plain_storage
from twofold.linalg.metric import working_dtype
from twofold.nn.compact import CompactLinear, bare_linear, counted

Form = Literal["plain", "rows", "columns"]


class FactoredLinear(CompactLinear):
    """y = W′x + b with W′ (out, in) of rank r, kept as two ``nn.Linear`` children, ``reduce`` and ``expand``.

    The children are ordinary linear layers, so quantizers, adapters and exporters handle them with no code of ours.
    Three forms hold the same kind of product (section 1 of docs/design.md):

    - plain:   W′ = expand · reduce, r(m + n) numbers;
    - rows:    r outputs are computed by ``reduce`` (r, n), the other outputs from them by ``expand`` (m − r, r);
    - columns: ``reduce`` (r, n − r) folds the other inputs into r of them, ``expand`` (m, r) gives the output.

    The last two store r(m + n − r) numbers and an integer ``order``. The one-element buffer ``weight`` is a guard:
    a program that does not know this layer finds a weight of the wrong shape in the checkpoint and stops, where it would
    otherwise start from random weights; code that asks for ``layer.weight.dtype`` or ``.device`` gets the right answer.

    Args:
        in_features, out_features: n and m.
        rank: r, between 1 and min(m, n); below m for rows and below n for columns.
        form: "plain", "rows" or "columns".
        bias: whether there is a bias (m,).
        transposed: whether the dense layer that this one replaces keeps its weight as (in, out), as GPT-2's Conv1D does.

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
        self,
        in_features: int,
        out_features: int,
        rank: int,
        form: Form = "plain",
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, form, transposed)
        largest = {
            "plain": min(in_features, out_features),
            "rows": min(in_features, out_features - 1),
            "columns": min(in_features - 1, out_features),
        }.get(form)
        if largest is None:
            raise ValueError(f"the form must be one of plain, rows, columns, got {form!r}")
        if not 1 <= rank <= largest:
            raise ValueError(
                f"the rank of a factored layer ({out_features}, {in_features}) in the form {form} "
                f"must be between 1 and {largest}, got {rank}"
            )
        self.rank, self.factored_inputs = rank, in_features
        inner = in_features - rank if form == "columns" else in_features
        outer = out_features - rank if form == "rows" else out_features
        self.reduce = bare_linear(inner, rank, device, dtype)
        self.expand = bare_linear(rank, outer, device, dtype)
        self._finish(bias, device, dtype)
        permuted = {"plain": 0, "rows": out_features, "columns": in_features}[form]
        self.register_buffer("order", counted(permuted, device) if permuted else None)

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
        m, r = left.shape
        n = right.shape[1]
        gauge = None if form == "plain" else gauge_form(left, right, form)
        chosen: Form = "plain" if gauge is None else gauge.form
        dtype = dtype or left.dtype
        layer = cls(n, m, r, chosen, bias is not None, transposed, device="meta", dtype=dtype)
        layer = layer.to_empty(device=left.device)
        if gauge is None:
            left, right = balanced(left, right)
            return layer._fill(bias, reduce=right, expand=left)
        return layer._fill(bias, reduce=gauge.reduce, expand=gauge.expand, order=gauge.order)

    @property
    def numbers(self) -> int:
        """The numbers that represent the weight: r(m + n) or r(m + n − r)."""
        count = plain_storage if self.form == "plain" else gauge_storage
        return count(self.out_features, self.factored_inputs, self.rank)

    @property
    def words(self) -> str:
        return f"factored, {self.form}, rank {self.rank}" + (f", {self.bits} bits" if self.bits else "")

    def index_error(self) -> str | None:
        """An order that is no permutation would read beyond the layer, or leave a part of it out."""
        order = self.order
        if order is None or order.is_meta:
            return None
        length = self.out_features if self.form == "rows" else self.factored_inputs
        if is_order(order, length):
            return None
        return f"order in the checkpoint is no order of its {length} {self.form}"

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
    ) -> tuple[Tensor, Tensor]:  # (m, r), (r, n): n are the inputs that are factored
        """Return the two factors in any of the forms, in the given dtype or the widest of the device."""
        dtype = dtype or working_dtype(self.weight.device)
        reduce, expand = self.reduce.weight.detach().to(dtype), self.expand.weight.detach().to(dtype)
        if self.order is None:
            return expand, reduce
        if self.form == "rows":
            one = torch.eye(self.rank, dtype=dtype, device=reduce.device)
            return torch.cat([one, expand]).index_select(0, self.order), reduce
        return expand, unfolded(reduce, self.order)

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        """The weight as one matrix, multiplied in float64 where the device has it; in the layer's dtype or the given one."""
        dtype = dtype or self.weight.dtype
        wide = working_dtype(self.weight.device)
        reduce, expand = self.reduce.weight.to(wide), self.expand.weight.to(wide)
        if self.form == "rows":
            assert self.order is not None
            return torch.cat([reduce, expand @ reduce]).index_select(0, self.order).to(dtype)
        if self.form == "columns":
            assert self.order is not None
            dense = torch.empty(self.out_features, self.factored_inputs, dtype=wide, device=expand.device)
            dense[:, self.order.long()] = torch.cat([expand, expand @ reduce], 1)
            return dense.to(dtype)
        return (expand @ reduce).to(dtype)


def unfolded(
    reduce: Tensor,  # (r, n − r)
    order: Tensor,  # (n,), the r inputs that stand for themselves first
) -> Tensor:  # (r, n)
    """Return the right factor of a gauge form on columns."""
    one = torch.eye(len(reduce), dtype=reduce.dtype, device=reduce.device)
    whole = reduce.new_empty(len(reduce), len(order))
    whole[:, order.long()] = torch.cat([one, reduce], 1)
    return whole


def balanced(
    left: Tensor,  # (m, r)
    right: Tensor,  # (r, n)
) -> tuple[Tensor, Tensor]:
    """The same product with the scale shared between its factors, so that neither overflows a narrow dtype."""
    balance = (left.norm(dim=0) / right.norm(dim=1).clamp_min(1e-30)).clamp(1e-30, 1e30).sqrt()
    return left / balance, right * balance[:, None]


def is_order(order: Tensor, length: int) -> bool:
    """Whether a tensor holds each of the integers below ``length`` once."""
    whole = torch.arange(length, device=order.device)
    fits = not order.is_floating_point() and order.shape == whole.shape
    return fits and torch.equal(order.sort().values.long(), whole)


class _Order(torch.autograd.Function):
    """``index_select`` by a permutation, whose gradient is one by the inverse; PyTorch would add rows up one after another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor) -> Tensor:
        # No view: some models clamp what a projection gives in place, which autograd forbids on a view that is made here.
        taken: Tensor = torch.ops.aten._unsafe_view(x.reshape(-1, x.shape[-1]).index_select(1, order), x.shape)
        return taken

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
    """The last dimension in another order. The plain operation where no gradient is asked for, so that exporters know it."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if torch.is_grad_enabled() and x.requires_grad and not tracing:
        y: Tensor = _Order.apply(x, order)  # type: ignore[no-untyped-call]
        return y
    return x.index_select(-1, order) if tracing else _taken(x, order)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """``index_select`` on the last dimension, by way of a matrix: PyTorch takes several times as long for more dimensions."""
    return x.reshape(-1, x.shape[-1]).index_select(1, order).view(x.shape)
