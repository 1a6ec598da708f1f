"""Factored layers as they run fastest: weights and layouts for inference alone, made from ``FactoredLinear`` and never stored.

A profile on a processor says what a factored layer loses beside its two products: joining pivots and other outputs and then
ordering them copies each output twice, and each small product has its own start. So here

- weights that read one input have their right factors in one matrix, and so one product;
- for many tokens both products write into one buffer; outputs are ordered once, and not at all where the neighbour takes them as
  they are (for a few tokens joining them is one call, and calls are what costs);
- the order is 64 bits wide, which ``index_select`` reads without a conversion, and taken from a matrix: from a tensor of three
  dimensions PyTorch takes it several times as slowly;
- a matrix with more rows than columns is kept by columns (``by_columns``), which a product with one vector reads faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 32  # tokens up to which calls cost more than copies


@dataclass(frozen=True)
class Part:
    """What one layer contributes to a group, in the numbers that it multiplies with.

    ``reduce`` (r, n) and ``expand``, which is (m − r, r) for pivots and (m, r) for plain factors. ``order`` (m,): output i is
    entry order[i] of [pivots, others]; None where the outputs are used as they come.
    """

    reduce: Tensor
    expand: Tensor
    pivots: bool
    order: Tensor | None = None
    bias: Tensor | None = None  # (m,), in the order in which the outputs are given


def fixed(tensor: Tensor) -> nn.Parameter:
    """Return a weight that is not trained."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def laid_out(weight: Tensor, by_columns: bool) -> Tensor:  # (m, n), the same numbers
    """Return a weight in the memory order that its product with one vector reads fastest, as a machine's measurement has it."""
    if by_columns and weight.shape[0] > weight.shape[1]:
        return weight.T.contiguous().T
    return weight.contiguous()


def _in_place(x: Tensor) -> bool:
    """Say whether products may write into a buffer: without a gradient, a trace, or a dtype that is chosen on the way."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    traced = torch.is_grad_enabled() and x.requires_grad
    return not traced and not torch.is_autocast_enabled(x.device.type)


class InputGroup(nn.Module):
    """Layers that read one input: y_i = W_i x + b_i for i = 1 … k, with the right factors of all in one matrix.

    The products stand in one buffer, [z_1 … z_k, e_1 … e_k] with [z_1 … z_k] = (R_1 … R_k) x and e_i = T_i z_i. Outputs that
    are ordered are taken from it in one step; at the most one layer with pivots has none to order, and it is the last.

    Args:
        parts: of the layers, in the order in which the model calls them; one of them may have pivots and no order.
        by_columns: see ``laid_out``.
    """

    order: Tensor | None
    order_bias: Tensor | None

    def __init__(self, parts: list[Part], by_columns: bool = False) -> None:
        super().__init__()
        loose = [i for i, part in enumerate(parts) if part.pivots and part.order is None]
        if len(loose) > 1:
            raise ValueError("only one layer of a group can go without an order")
        self.in_features = parts[0].reduce.shape[1]
        others = [i for i in range(len(parts)) if i not in loose]
        stacked, self._after = others + loose, loose + others  # in the order of z, and of e
        self.reduce = fixed(laid_out(torch.cat([parts[i].reduce for i in stacked]), by_columns))
        self.expands = nn.ParameterList([fixed(laid_out(part.expand, by_columns)) for part in parts])
        widths = [*(len(parts[i].reduce) for i in stacked), *(len(parts[i].expand) for i in self._after)]
        spans, k = list(pairwise(accumulate(widths, initial=0))), len(parts)
        self.rank, self.width = spans[k - 1][1], spans[-1][1]
        inner, outer = dict(zip(stacked, spans[:k], strict=True)), dict(zip(self._after, spans[k:], strict=True))
        self.inner, self.outer = [inner[i] for i in range(k)], [outer[i] for i in range(k)]  # where z_i and e_i stand
        self._take(parts)
        self._outputs: tuple[Tensor, int, list[Tensor]] | None = None
        self._remember()

    def _remember(self) -> None:
        """Hold the tensors where they are found faster than among a module's parameters."""
        steps = [(self.expands[i], *self.inner[i], *self.outer[i]) for i in self._after]
        biases = [self.biases.get(str(i)) for i in range(len(self.places))]
        self._fast = self.reduce, steps, self.order, self.order_bias, biases

    def _apply(self, fn: Any, recurse: bool = True) -> InputGroup:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._outputs = None
        self._remember()
        return self

    def _take(self, parts: list[Part]) -> None:
        """Find each output: in the buffer, or among the ordered ones."""
        self.places: list[tuple[bool, int, int]] = []  # ordered or not, from, to
        orders, biases, at = [], [], 0
        for part, (z, r), (e, end) in zip(parts, self.inner, self.outer, strict=True):
            if part.pivots and part.order is not None:
                whole = torch.cat([torch.arange(z, r), torch.arange(e, end)]).to(part.order.device)
                orders.append(whole[part.order.long()])
                biases.append(part.reduce.new_zeros(len(whole)) if part.bias is None else part.bias)
                self.places.append((True, at, at + len(whole)))
                at += len(whole)
            else:
                self.places.append((False, z if part.pivots else e, end))
        self.register_buffer("order", torch.cat(orders) if orders else None, persistent=False)
        added = any(place[0] and part.bias is not None for part, place in zip(parts, self.places, strict=True))
        self.register_buffer("order_bias", torch.cat(biases) if added else None, persistent=False)
        plain = {i: part.bias for i, part in enumerate(parts) if part.bias is not None and not self.places[i][0]}
        self.biases = nn.ParameterDict({str(i): fixed(bias) for i, bias in plain.items()})

    def forward(
        self,
        x: Tensor,  # (..., n)
    ) -> list[Tensor]:  # k of (..., m_i)
        """Compute the outputs of all layers; some are parts of one tensor."""
        flat = x.reshape(-1, self.in_features)
        buffer = self._products(flat)
        _, _, order, bias, biases = self._fast
        ordered = buffer
        if order is not None:
            ordered = buffer.index_select(1, order)
            if bias is not None:
                ordered = ordered + bias
        ordered = ordered.view(*x.shape[:-1], ordered.shape[1])
        if self.places == [(True, 0, ordered.shape[-1])]:
            return [ordered]
        buffer = buffer.view(*x.shape[:-1], self.width)
        outputs = []
        for (is_ordered, first, last), own in zip(self.places, biases, strict=True):
            y = (ordered if is_ordered else buffer).narrow(-1, first, last - first)
            outputs.append(y if own is None else y + own)
        return outputs

    def _products(
        self,
        flat: Tensor,  # (tokens, n)
    ) -> Tensor:  # (tokens, width)
        reduce, steps, *_ = self._fast
        if len(flat) > FEW and _in_place(flat):
            buffer = flat.new_empty(len(flat), self.width)
            torch.mm(flat, reduce.T, out=buffer[:, : self.rank])
            for expand, z, r, e, end in steps:
                torch.mm(buffer[:, z:r], expand.T, out=buffer[:, e:end])
            return buffer
        inner = F.linear(flat, reduce)
        if len(steps) == 1:
            return torch.cat((inner, F.linear(inner, steps[0][0])), 1)
        outer = [F.linear(inner.narrow(1, z, r - z), expand) for expand, z, r, _, _ in steps]
        return torch.cat((inner, *outer), 1)

    def output(self, index: int, x: Tensor) -> Tensor:  # (..., m)
        """Return the output of one layer. All are computed for the first that asks, and kept until the last one has asked.

        What is kept belongs to this very tensor, unchanged, and is replaced as a whole: threads that run the model at once
        compute it again at the worst.
        """
        last = len(self.places) - 1
        if last == 0:
            return self.forward(x)[0]
        version = -1 if torch.compiler.is_compiling() or x.is_inference() else x._version
        outputs = self._outputs
        if outputs is None or outputs[0] is not x or outputs[1] != version:
            outputs = (x, version, self.forward(x))
        self._outputs = None if index == last else outputs
        return outputs[2][index]


class GroupedLinear(nn.Module):
    """One layer of a group. The first of them holds the group, the others refer to it.

    ``weight`` has one element, for code that asks a layer for its dtype or device.
    """

    weight: Tensor

    def __init__(self, group: InputGroup, index: int, out_features: int, holds: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.index = group.in_features, out_features, index
        self._link = (group,)  # in a tuple, which PyTorch does not look into
        if holds:
            self.group = group
        self.register_buffer("weight", group.reduce.new_zeros(1), persistent=False)

    def forward(
        self,
        x: Tensor,  # (..., n)
    ) -> Tensor:  # (..., m)
        return self._link[0].output(self.index, x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, of a group of {len(self._link[0].places)}"


class ColumnsLinear(nn.Module):
    """y = A′(x_K + S x_rest) + b, the gauge form on columns: the sum is the product's own.

    Args:
        reduce: S (r, n − r).
        expand: A′ (m, r).
        order: (n,), the r inputs K first; None if they come like that.
    """

    weight: Tensor
    order: Tensor | None

    def __init__(
        self, reduce: Tensor, expand: Tensor, order: Tensor | None, bias: Tensor | None, by_columns: bool = False
    ) -> None:
        super().__init__()
        self.rank = len(reduce)
        self.in_features, self.out_features = reduce.shape[1] + self.rank, len(expand)
        self.reduce, self.expand = fixed(laid_out(reduce, by_columns)), fixed(laid_out(expand, by_columns))
        self.register_buffer("order", None if order is None else order.long(), persistent=False)
        self.bias = None if bias is None else fixed(bias)
        self.register_buffer("weight", reduce.new_zeros(1), persistent=False)

    def forward(
        self,
        x: Tensor,  # (..., n)
    ) -> Tensor:  # (..., m)
        flat = x.reshape(-1, self.in_features)
        if self.order is not None:
            flat = flat.index_select(1, self.order)
        inner = torch.addmm(flat[:, : self.rank], flat[:, self.rank :], self.reduce.T)
        return F.linear(inner, self.expand, self.bias).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
