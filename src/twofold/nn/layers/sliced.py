"""A linear layer of which only some output rows, or only some input columns, are kept."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from twofold.nn.compact import CompactLinear, Place, check_size, counted, unfilled

SlicedForm = Literal["kept-rows", "kept-columns"]


class SlicedLinear(CompactLinear):
    """y = W′x + b where all rows of W′ (out, in), or all columns, but some are zero; those are one ``nn.Linear``, ``inner``.

    The outer shapes are those of the dense layer, so that the forward of any architecture works unchanged:

    - kept-rows:    ``inner`` (kept, in) gives the outputs at ``index``, the others are zero (and the bias);
    - kept-columns: ``inner`` (out, kept) reads the inputs at ``index``, the others are ignored.

    Args:
        in_features, out_features: n and m of the dense layer.
        kept: how many rows or columns.
        place: ``bias``, ``transposed``, ``device`` and ``dtype``.

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
        self, in_features: int, out_features: int, kept: int, form: SlicedForm = "kept-rows", **place: Unpack[Place]
    ) -> None:
        super().__init__(in_features, out_features, form, **place)
        check_size(kept, self.whole, f"a sliced layer ({out_features}, {in_features}) keeps", f" {self.side}")
        self.kept = kept
        self.inner = self.child(*((in_features, kept) if self.side == "rows" else (kept, out_features)))
        self.register_buffer("index", counted(kept, self.weight.device))

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
        n, m = (part.shape[1], size) if form == "kept-rows" else (size, part.shape[0])
        layer = cls(n, m, len(index), form, **unfilled(bias, transposed, dtype or part.dtype))
        return layer.fill(part.device, bias=bias, inner=part, index=index)

    @property
    def side(self) -> str:
        """What some are kept of: rows or columns."""
        return self.form.removeprefix("kept-")

    @property
    def whole(self) -> int:
        """How many there are of them in the dense layer."""
        return self.out_features if self.form == "kept-rows" else self.in_features

    @property
    def words(self) -> str:
        return f"sliced, {self.kept} of {self.whole} {self.side}"

    def product(self, x: Tensor) -> Tensor:
        if self.form == "kept-columns":
            return self.inner(x.index_select(-1, self.index))  # type: ignore[no-any-return]
        part: Tensor = self.inner(x)
        return part.new_zeros(*part.shape[:-1], self.out_features).index_copy(-1, self.index.long(), part)

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        """Return the weight as one matrix, with zeros for what is not kept."""
        part = self.inner.weight.to(dtype or self.weight.dtype)
        dense = part.new_zeros(self.out_features, self.in_features)
        return dense.index_copy(0 if self.form == "kept-rows" else 1, self.index.long(), part)

    def index_error(self) -> str | None:
        """Say what is wrong with the index: one that does not ascend would read beyond the layer, or count a row twice."""
        index = self.index
        if index.is_meta:
            return None
        if not index.is_floating_point() and index.shape == (self.kept,):
            wide = index.long()
            if int(wide[0]) >= 0 and int(wide[-1]) < self.whole and bool((wide[1:] > wide[:-1]).all()):
                return None
        return f"index in the checkpoint does not name {self.kept} of its {self.whole} {self.side}"
