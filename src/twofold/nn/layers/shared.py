"""Linear layers of several blocks that share one basis for their inputs, which the model stores once."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from twofold.linalg.metric import working_dtype
from twofold.nn.compact import CompactLinear, check_settings, linear_shape, place_of
from twofold.nn.layers._basis import SharedBasis


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

    KIND = "shared"
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
        super().__init__(basis.in_features, out_features, basis.form, transposed)
        self.rank = basis.rank
        self._link = (basis,)  # in a tuple, which PyTorch does not look into
        self.expand = nn.Linear(basis.rank, out_features, bias=False, device=device, dtype=dtype)
        self._finish(bias, device, dtype)

    @classmethod
    def empty(cls, module: nn.Module, settings: Mapping[str, Any], model: nn.Module, shared: dict[str, Any]) -> Self:
        check_settings(settings, {"rank": "its rank"}, {"kind", "form", "basis"})
        name, rank, form = settings.get("basis"), settings["rank"], settings.get("form")
        if type(name) is not str or not name or "." in name:
            raise TypeError(f"it must have the name of its basis, without dots, got {reprlib.repr(name)}")
        in_features, out_features = linear_shape(module)
        place = place_of(module)
        if name not in shared:
            shared[name] = SharedBasis(name, in_features, rank, form, place["device"], place["dtype"])  # type: ignore[arg-type]
        basis = shared[name]
        if (in_features, rank, form) != (basis.in_features, basis.rank, basis.form):
            raise ValueError(
                f"the basis {reprlib.repr(name)} has {basis.in_features} inputs, rank {basis.rank} and the form {basis.form} in "
                f"another layer, here it has {in_features} inputs, rank {rank} and the form {reprlib.repr(form)}"
            )
        return cls(basis, out_features, **place)

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
        return layer.to_empty(device=expand.device)._fill(bias, expand=expand)

    @property
    def basis(self) -> SharedBasis:
        """The basis that it refers to."""
        return self._link[0]

    @property
    def words(self) -> str:
        return f"factored on a shared basis, rank {self.rank}"

    def settings(self) -> dict[str, Any]:
        return {"kind": self.KIND, "rank": self.rank, "form": self.form, "basis": self.basis.name}

    def product(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        return self.expand(self.basis(x))  # type: ignore[no-any-return]

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        """The weight as one matrix, multiplied in float64 where the device has it; in the layer's dtype or the given one."""
        wide = working_dtype(self.weight.device)
        return (self.expand.weight.to(wide) @ self.basis.matrix(wide)).to(dtype or self.weight.dtype)
