"""A linear layer of which only some output rows, or only some input columns, are kept."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from twofold.nn.compact import CompactLinear

SlicedForm = Literal["kept-rows", "kept-columns"]


class SlicedLinear(CompactLinear):
    """y = W′x + b where all rows of W′ (out, in), or all columns, but some are zero; those are one ``nn.Linear``, ``inner``.

    The outer shapes are those of the dense layer, so that the forward of any architecture works unchanged:

    - kept-rows:    ``inner`` (kept, in) gives the outputs at ``index``, the others are zero (and the bias);
    - kept-columns: ``inner`` (out, kept) reads the inputs at ``index``, the others are ignored.

    Args:
        in_features, out_features: n and m of the dense layer.
        kept: how many rows or columns.
        bias: whether there is a bias (m,).
        transposed: whether the dense layer that this one replaces keeps its weight as (in, out), as GPT-2's Conv1D does.

    >>> import torch
    >>> layer = SlicedLinear(8, 6, kept=2, form="kept-rows")
    >>> layer(torch.randn(3, 8)).shape
    torch.Size([3, 6])
    """

    KIND = "sliced"
    CHILDREN = ("inner",)
    FORMS = ("kept-rows", "kept-columns")
    NUMBERS = {"kept": "how much it keeps"}

    form: SlicedForm
    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept: int,
        form: SlicedForm = "kept-rows",
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, form, transposed)
        if form not in self.FORMS:
            raise ValueError(f"the form must be one of {', '.join(self.FORMS)}, got {form!r}")
        rows = form == "kept-rows"
        largest = out_features if rows else in_features
        if not 1 <= kept <= largest:
            raise ValueError(
                f"a sliced layer ({out_features}, {in_features}) keeps between 1 and {largest} "
                f"{'rows' if rows else 'columns'}, got {kept}"
            )
        self.kept = kept
        shape = (in_features, kept) if rows else (kept, out_features)
        self.inner = nn.Linear(*shape, bias=False, device=device, dtype=dtype)
        self._finish(bias, device, dtype)
        self.register_buffer("index", torch.arange(kept, device=device, dtype=torch.int32))

    @classmethod
    def from_part(
        cls,
        part: Tensor,  # (kept, n) for rows, (m, kept) for columns
        index: Tensor,  # (kept,), ascending
        size: int,  # m for rows, n for columns: of the dense layer
        form: SlicedForm,
        bias: Tensor | None = None,  # (m,)
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> SlicedLinear:
        """Build the layer from the part that is kept; ``dtype`` is that of the stored numbers, the part's own by default."""
        kept, other = part.shape if form == "kept-rows" else part.T.shape
        shape = (other, size) if form == "kept-rows" else (size, other)
        dtype = dtype or part.dtype
        layer = cls(*shape, kept, form, bias is not None, transposed, device="meta", dtype=dtype)
        return layer.to_empty(device=part.device)._fill(bias, inner=part, index=index)

    @property
    def words(self) -> str:
        size = self.out_features if self.form == "kept-rows" else self.in_features
        return f"sliced, {self.kept} of {size} {self.form.removeprefix('kept-')}"

    def product(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        if self.form == "kept-columns":
            return self.inner(x.index_select(-1, self.index))  # type: ignore[no-any-return]
        part: Tensor = self.inner(x)
        return part.new_zeros(*part.shape[:-1], self.out_features).index_copy(-1, self.index.long(), part)

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        """The weight as one matrix, with zeros for what is not kept."""
        part = self.inner.weight.to(dtype or self.weight.dtype)
        dense = part.new_zeros(self.out_features, self.in_features)
        return dense.index_copy(0 if self.form == "kept-rows" else 1, self.index.long(), part)

    def index_error(self) -> str | None:
        """An index that is not ascending would read beyond the layer, or count a row twice."""
        index, size = self.index, self.out_features if self.form == "kept-rows" else self.in_features
        if index.is_meta:
            return None
        if not index.is_floating_point() and index.shape == (self.kept,):
            wide = index.long()
            if int(wide[0]) >= 0 and int(wide[-1]) < size and bool((wide[1:] > wide[:-1]).all()):
                return None
        return f"index in the checkpoint does not name {self.kept} of its {size} {self.form.removeprefix('kept-')}"
