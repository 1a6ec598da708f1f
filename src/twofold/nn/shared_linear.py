"""Linear layers of several blocks that share one basis for their inputs, which the model stores once."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from twofold.linalg.gauge import gauge_form
from twofold.linalg.metric import working_dtype
from twofold.nn.compact_linear import CompactLinear
from twofold.nn.factored_linear import balanced, is_order, ordered

SharedForm = Literal["shared-plain", "shared-columns"]
BASES = "twofold_bases"  # where a model holds its bases


class SharedBasis(nn.Module):
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

    CHILDREN: ClassVar[tuple[str, ...]] = ("reduce",)
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
        if self.order is None:
            return reduce
        whole = reduce.new_empty(self.rank, self.in_features)
        whole[:, self.order.long()] = torch.cat([torch.eye(self.rank, dtype=dtype, device=reduce.device), reduce], 1)
        return whole

    def index_error(self) -> str | None:
        """What is wrong with the order that was loaded, in words that follow the name of the basis; None if nothing is."""
        if self.order is None or self.order.is_meta or is_order(self.order, self.in_features):
            return None
        return f"order in the checkpoint is no order of its {self.in_features} columns"

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, rank={self.rank}, form={self.form}"


class SharedLinear(CompactLinear):
    """y = E B x + b with E (out, r) of its own, and a basis B (r, in) that layers of other blocks use too.

    The layer refers to its basis and does not hold it: the model does (``hold_bases``), so that it is stored, moved and trained
    once. ``numbers`` are those of E alone. A deep copy of the layer alone has a basis of its own; layers that are copied in one
    call, or with their model, share the copy.

    Args:
        basis: with the inputs, the rank and the form.
        out_features: m.
        bias: whether there is a bias (m,).
        transposed: whether the dense layer that this one replaces keeps its weight as (in, out), as GPT-2's Conv1D does.

    >>> import torch
    >>> basis = SharedBasis("q", 8, rank=3)
    >>> first, second = SharedLinear(basis, 6), SharedLinear(basis, 6)
    >>> first(torch.randn(2, 8)).shape
    torch.Size([2, 6])
    """

    CHILDREN = ("expand",)
    FORMS = SharedBasis.FORMS

    def __init__(
        self,
        basis: SharedBasis,
        out_features: int,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = basis.in_features, out_features
        self.rank, self.form = basis.rank, basis.form
        self.transposed = transposed
        self._link = (basis,)  # in a tuple, which PyTorch does not look into
        self.expand = nn.Linear(basis.rank, out_features, bias=False, device=device, dtype=dtype)
        self._add_bias_and_guard(bias, device, dtype)

    @classmethod
    def on(
        cls,
        basis: SharedBasis,
        expand: Tensor,  # (m, r)
        bias: Tensor | None = None,  # (m,)
        transposed: bool = False,
    ) -> SharedLinear:
        """Build the layer from its coefficients on a basis, in the dtype of the basis."""
        layer = cls(basis, len(expand), bias is not None, transposed, "meta", basis.reduce.weight.dtype)
        layer = layer.to_empty(device=expand.device)
        with torch.no_grad():
            layer.expand.weight.copy_(expand)
            layer._fill_bias_and_guard(bias)
        return layer

    @property
    def basis(self) -> SharedBasis:
        """The basis that it refers to."""
        return self._link[0]

    @property
    def words(self) -> str:
        return f"factored on a shared basis, rank {self.rank}"

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "form": self.form, "basis": self.basis.name}

    def forward(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        y: Tensor = self.expand(self.basis(x))
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        """The weight as one matrix, multiplied in float64 where the device has it; in the layer's dtype or the given one."""
        wide = working_dtype(self.weight.device)
        return (self.expand.weight.to(wide) @ self.basis.matrix(wide)).to(dtype or self.weight.dtype)

    def index_error(self) -> str | None:
        return None  # the order is the basis's

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"form={self.form}, basis={self.basis.name}, bias={self.bias is not None}"
        )


def basis_storage(form: SharedForm, in_features: int, rank: int) -> int:
    """The numbers that a basis stores: r n, or r(n − r) with r of the inputs in themselves."""
    return rank * (in_features if form == "shared-plain" else in_features - rank)


def hold_bases(model: nn.Module) -> None:
    """Make a model hold the bases that its layers refer to, and no others.

    They stand in the base model, so that a checkpoint has them under a name that serves every head.

    Raises:
        ValueError: if layers refer to two bases of one name, as when one layer was copied alone.
    """
    home = getattr(model, "base_model", model)
    found: dict[str, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, SharedLinear) and found.setdefault(module.basis.name, module.basis) is not module.basis:
            raise ValueError(f"the layers of the model refer to two bases that are called {module.basis.name}")
    if found:
        setattr(home, BASES, nn.ModuleDict(found))
    elif hasattr(home, BASES):
        delattr(home, BASES)
