"""What a weight is: the kinds of modules whose weight is a matrix W of y = W x, by name, one file each.

A kind finds its weights in a model, shows what passes them, and gives the layer that takes their place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from twofold.model.target import Target
from twofold.nn.compact import Compact, CompactLinear
from twofold.registry import Registry

Taker: TypeAlias = Callable[[Tensor], object]
Watcher: TypeAlias = Callable[[Tensor, Callable[[], Tensor]], Taker | None]


@dataclass(frozen=True)
class Sink:
    """The receiver of what passes a weight, call by call.

    Args:
        calls: is given x (..., n) and a function that computes y = W x (..., m), without the bias; returns what takes the
            gradient of the loss at that output (..., m) in the backward pass, or None.
        input_gradients: takes what the weight hands back to its input, Wᵀ g (..., n).
        starts: whether an input that no gradient would reach starts a graph, so that there is one though no weight needs it.
    """

    calls: Watcher | None = None
    input_gradients: Taker | None = None
    starts: bool = False


class Kind(ABC):
    """One kind of modules with a weight W (m, n)."""

    name: ClassVar[str]

    @abstractmethod
    def takes(self, module: nn.Module) -> bool:
        """Say whether a module is of this kind."""

    @abstractmethod
    def dense(self, module: nn.Module) -> Tensor:  # (m, n)
        """Return W, whatever layout the module keeps it in."""

    @abstractmethod
    def watch(self, module: nn.Module, sink: Sink) -> list[Any]:
        """Give a sink what passes the weight; return the handles that end it."""

    @abstractmethod
    def layer(
        self,
        module: nn.Module,
        left: Tensor,  # (m, r)
        right: Tensor,  # (r, n)
        form: str,  # "auto": the gauge form where it is bounded; or "plain"
        dtype: torch.dtype,  # of the stored numbers
    ) -> CompactLinear:
        """Return the layer that computes the same with W = left · right."""

    def target(self, name: str, module: nn.Module) -> Target:
        """Return the weight of a module as a target."""
        m, n = self.dense(module).shape
        return Target(name, m, n, getattr(module, "bias", None) is not None, False)

    def reason(self, model: nn.Module, module: nn.Module, parent: nn.Module) -> str | None:
        """Say why the weight of a module, in its parent, stays dense; None if nothing is against it."""
        return None


KINDS: Registry[Kind] = Registry("kind of weight", __name__)
K = TypeVar("K", bound=type[Kind])


def kind(cls: K) -> K:
    """Register a class as a kind of weight."""
    KINDS.add(cls.name, cls())
    return cls


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a module's weight; None if it has none that can be factorized."""
    return next((kind for kind in KINDS.all() if kind.takes(module)), None)


def watch(module: nn.Module, sink: Sink) -> list[Any]:
    """Give a sink what passes a module's weight; return the handles that end it."""
    kind = kind_of(module) or (KINDS.get("linear") if isinstance(module, Compact) else None)
    assert kind is not None
    return kind.watch(module, sink)


def dense_weight(module: nn.Module) -> Tensor:  # (m, n)
    """Return the weight of a module as one matrix of y = W x."""
    if isinstance(module, CompactLinear):
        return module.to_dense()
    kind = kind_of(module)
    assert kind is not None
    return kind.dense(module)
