"""Linear layers of several blocks that share one basis for their inputs, which the model stores once."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from twofold.linalg.metric import working_dtype
from twofold.nn.compact import CompactLinear, Place, linear_shape, place_of, unfilled
from twofold.nn.layers._basis import SharedBasis


class SharedLinear(CompactLinear):
    """y = E B x + b with E (out, r) of its own, and a basis B (r, in) that layers of other blocks use too.

    The layer refers to its basis and does not hold it: the model does (``hold_bases``), so that it is stored, moved and trained
    once. ``numbers`` are those of E alone. A deep copy of the layer alone has a basis of its own; layers that are copied in one
    call, or with their model, share the copy.

    Args:
        basis: with the inputs, the rank and the form.
        out_features: m.
        place: ``bias``, ``transposed``, ``device`` and ``dtype``.

    >>> import torch
    >>> basis = SharedBasis("q", 8, rank=3)
    >>> first, second = SharedLinear(basis, 6), SharedLinear(basis, 6)
    >>> first(torch.randn(2, 8)).shape
    torch.Size([2, 6])
    """

    KIND = "shared"
    CHILDREN = ("expand",)
    FORMS = SharedBasis.FORMS
    NUMBERS = {"rank": "its rank"}
    OTHERS = ("basis",)

    def __init__(self, basis: SharedBasis, out_features: int, **place: Unpack[Place]) -> None:
        super().__init__(basis.in_features, out_features, basis.form, **place)
        self.rank = basis.rank
        self._link = (basis,)  # in a tuple, which PyTorch does not look into
        self.expand = self.child(basis.rank, out_features)

    @classmethod
    def empty(cls, module: nn.Module, settings: Mapping[str, Any], model: nn.Module, shared: dict[str, Any]) -> Self:
        rank = cls.read(settings)["rank"]
        name, form = settings.get("basis"), settings.get("form")
        if type(name) is not str or not name or "." in name:
            raise TypeError(f"it must have the name of its basis, without dots, got {reprlib.repr(name)}")
        in_features, out_features = linear_shape(module)
        place = place_of(module)
        if name not in shared:
            shared[name] = SharedBasis(name, in_features, rank, form, device=place["device"], dtype=place["dtype"])  # type: ignore[arg-type]
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
        layer = cls(basis, len(expand), **unfilled(bias, transposed, basis.reduce.weight.dtype))
        return layer.fill(expand.device, bias=bias, expand=expand)

    @property
    def basis(self) -> SharedBasis:
        """The basis that it refers to."""
        return self._link[0]

    @property
    def words(self) -> str:
        return f"factored on a shared basis, rank {self.rank}"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "basis": self.basis.name}

    def product(self, x: Tensor) -> Tensor:
        return self.expand(self.basis(x))  # type: ignore[no-any-return]

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        """Return the weight as one matrix, multiplied in float64 where the device has it."""
        wide = working_dtype(self.weight.device)
        return (self.expand.weight.to(wide) @ self.basis.matrix(wide)).to(dtype or self.weight.dtype)
