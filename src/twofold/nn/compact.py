"""What a storage layer is: it takes the place of a dense layer, and stores its weight in fewer numbers or bits.

A layer is known by its kind, which config.json names: ``"kind": "factored"``. A file in nn/layers holds the layer of its
name; one of another package is known once its class has been made.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import Self, TypedDict, Unpack

from twofold.nn.int_matrix import IntLinear
from twofold.registry import Registry


class Factory(TypedDict, total=False):
    """How the tensors of a layer are made."""

    device: torch.device | str | None
    dtype: torch.dtype | None


class Place(Factory, total=False):
    """How a layer is made to take the place of a linear one."""

    bias: bool  # whether it has one (m,), as it has by default
    transposed: bool  # whether the dense layer keeps its weight as (in, out), as GPT-2's Conv1D does


class Compact(nn.Module):
    """A module that stores a weight in fewer numbers or bits than the dense layer whose place it takes.

    ``CHILDREN`` name the modules that hold its numbers. ``weight`` is a buffer of one element, a guard: a program that does not
    know the layer finds a weight of the wrong shape in the checkpoint and stops, where it would else start from random weights.
    Code that asks for ``layer.weight.dtype`` or ``.device`` gets the right answer.
    """

    KIND: ClassVar[str] = ""  # by which config.json names it; "" for what belongs to other layers
    CHILDREN: ClassVar[tuple[str, ...]] = ()
    FORMS: ClassVar[tuple[str, ...]] = ()  # that it may have; the first one, where config.json says none
    NUMBERS: ClassVar[Mapping[str, str]] = {}  # its settings that are whole numbers, each with what it is, in words
    OTHERS: ClassVar[tuple[str, ...]] = (
        "bits",
        "group",
    )  # the settings that it may have beside these, its kind and form

    weight: Tensor
    form: str
    bits: int | None = None  # of the children's numbers, where they are integers
    group: int | None = None  # inputs that share a scale; None: all of an output

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "KIND" in cls.__dict__ and cls.KIND:
            LAYERS.add(cls.KIND, cls)

    @classmethod
    def empty(cls, module: nn.Module, settings: Mapping[str, Any], model: nn.Module, shared: dict[str, Any]) -> Self:
        """Make an empty layer in the place of a dense one, on its device.

        Args:
            settings: what config.json says of the layer, as ``settings`` gave it.
            model: in which the layer will stand.
            shared: by names, what several layers refer to; what is missing is added.

        Raises:
            TypeError: if the settings lack a number, or say what there is not.
            ValueError: if they do not fit the module.
        """
        raise NotImplementedError

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> dict[str, int]:
        """Return the whole numbers of settings, all of which are checked.

        Raises:
            TypeError: if one of them is none, or there is a setting that the layer does not have; with what it must have.
            ValueError: if there is no such form.
        """
        others = {"kind", "form", *cls.OTHERS}
        wrong = [words for key, words in cls.NUMBERS.items() if type(settings.get(key)) is not int]
        unknown = settings.keys() - cls.NUMBERS.keys() - others
        if unknown and not cls.NUMBERS:
            raise TypeError(f"it may have {', '.join(sorted(others))} alone, and not {reprlib.repr(min(unknown))}")
        if wrong or unknown:
            whole = " and ".join(f"a whole number as {words}" for words in wrong or cls.NUMBERS.values())
            raise TypeError(f"it must have {whole}, and a form, got {reprlib.repr(dict(settings))}")
        cls.check_form(settings.get("form", cls.FORMS[0]))
        return {name: settings[name] for name in cls.NUMBERS}

    @classmethod
    def check_form(cls, form: str) -> None:
        """Refuse a form that the layer does not have.

        Raises:
            ValueError: with those that it has.
        """
        if form not in cls.FORMS:
            raise ValueError(f"the form must be one of {', '.join(cls.FORMS)}, got {reprlib.repr(form)}")

    @torch.no_grad()
    def fill(self, device: torch.device, **numbers: Tensor | None) -> Self:
        """Give a layer that was made on the meta device its numbers: of children, buffers and the bias, by their names."""
        self.to_empty(device=device)
        for name, value in numbers.items():
            if value is not None:
                place = getattr(self, name)
                target: Any = place.weight if isinstance(place, nn.Module) else place
                target.copy_(value)
        if self.KIND:
            self.weight.zero_()
        return self

    def settings(self) -> dict[str, Any]:
        """Return what config.json says of the layer, beside its shape."""
        numbers = {name: getattr(self, name) for name in self.NUMBERS}
        integers = {} if self.bits is None else {"bits": self.bits, "group": self.group}
        return {"kind": self.KIND, **numbers, "form": self.form, **integers}

    @property
    def numbers(self) -> int:
        """The numbers that represent the weight."""
        raise NotImplementedError

    @property
    def words(self) -> str:
        """What kind of layer it is, for a table."""
        raise NotImplementedError

    @property
    def shape(self) -> list[int]:
        """Of the matrix that it stands for."""
        raise NotImplementedError

    def dense_module(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the layer that computes the same, of the kind that the architecture has at that place."""
        raise NotImplementedError

    def index_error(self) -> str | None:
        """Say what is wrong with the integers that were loaded, in words that follow the layer's name; None if nothing is."""
        return None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())


LAYERS: Registry[type[Compact]] = Registry("storage layer", "twofold.nn.layers")


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear layer.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(module, Conv1D):
        inner, outer = module.weight.shape
        return int(inner), int(outer)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    raise ValueError(f"it is no linear layer but a {type(module).__name__}")


class CompactLinear(Compact):
    """y = W′x + b with W′ (out, in) kept in fewer than out · in numbers, by ``nn.Linear`` children."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: str,
        bias: bool = True,
        transposed: bool = False,
        **factory: Unpack[Factory],
    ) -> None:
        super().__init__()
        self.check_form(form)
        self.in_features, self.out_features = in_features, out_features
        self.form, self.transposed = form, transposed
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, **factory)) if bias else None)
        self.register_buffer("weight", torch.zeros(1, **factory))

    @classmethod
    def empty(cls, module: nn.Module, settings: Mapping[str, Any], model: nn.Module, shared: dict[str, Any]) -> Self:
        numbers: dict[str, Any] = cls.read(settings)
        form = settings.get("form", cls.FORMS[0])
        layer = cls(*linear_shape(module), form=form, **numbers, **place_of(module))
        if "bits" in settings or "group" in settings:
            layer.hold_integers(*integers_of(settings))
        return layer

    def child(self, in_features: int, out_features: int) -> nn.Linear:
        """Return an ``nn.Linear`` without a bias, on the device and in the dtype of the layer.

        On the meta device nothing is initialized, which is slow there.
        """
        like = self.weight
        if not like.is_meta:
            return nn.Linear(in_features, out_features, bias=False, device=like.device, dtype=like.dtype)
        layer = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = in_features, out_features
        layer.weight = nn.Parameter(like.new_empty(out_features, in_features))
        layer.register_parameter("bias", None)
        return layer

    @property
    def numbers(self) -> int:
        children = [getattr(self, child) for child in self.CHILDREN]
        return sum(child.in_features * child.out_features for child in children)

    @property
    def quantized_bytes(self) -> int | None:
        """What the children store, scales and all, where they are integers."""
        return None if self.bits is None else sum(getattr(self, child).bytes for child in self.CHILDREN)

    def hold_integers(self, bits: int, group: int | None, **children: IntLinear) -> None:
        """Give the layer children of integers: those that are named, and else empty ones of the same shapes."""
        for name in self.CHILDREN:
            old = getattr(self, name)
            shape = old.out_features, old.in_features
            child = children.get(name) or IntLinear(*shape, bits, group, old.weight.device)
            if (child.rows, child.columns) != shape:
                raise ValueError(f"{name} must be {shape}, got {(child.rows, child.columns)}")
            setattr(self, name, child)
        self.bits, self.group = bits, group

    @property
    def shape(self) -> list[int]:
        return [self.out_features, self.in_features]

    @property
    def keep(self) -> float:
        """The numbers that represent the weight over out · in."""
        return self.numbers / (self.out_features * self.in_features)

    def product(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        """Return W′x."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:  # (..., out)
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        """Return the weight as one matrix, in the layer's dtype or the given one."""
        raise NotImplementedError

    def dense_module(self, dtype: torch.dtype | None = None) -> nn.Module:
        return dense_linear(self.to_dense().to(dtype or self.weight.dtype), self.bias, self.transposed)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {super().extra_repr()}, keep={self.keep:.3f}"


def dense_linear(
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    transposed: bool,
) -> nn.Module:
    """Return an ``nn.Linear`` of a weight, or GPT-2's ``Conv1D``, which keeps it as (in, out)."""
    m, n = weight.shape
    dense: nn.Module
    if transposed:
        dense = Conv1D(m, n).to(weight.device, weight.dtype)
        dense.weight = nn.Parameter(weight.T.contiguous())
    else:
        dense = nn.Linear(n, m, bias is not None, device="meta", dtype=weight.dtype)
        dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(weight.dtype))
    return dense


def place_of(module: nn.Module) -> Place:
    """Return how a layer must be made to take the place of a linear one."""
    weight: Any = module.weight
    bias = getattr(module, "bias", None) is not None
    return {"bias": bias, "transposed": isinstance(module, Conv1D), "device": weight.device, "dtype": weight.dtype}


def unfilled(
    bias: Tensor | None, transposed: bool, dtype: torch.dtype | None, device: torch.device | str = "meta"
) -> Place:
    """Return how a layer must be made that gets its numbers afterwards, by ``fill``."""
    return {"bias": bias is not None, "transposed": transposed, "device": device, "dtype": dtype}


def counted(length: int, device: torch.device | str | None) -> Tensor:  # (length,), int32
    """Return 0, 1, 2, …; on the meta device just its shape, since ``torch.arange`` is slow there."""
    order = torch.empty(length, device=device, dtype=torch.int32)
    return order if order.is_meta else torch.arange(length, device=device, dtype=torch.int32)


def check_size(size: int, largest: int, before: str, after: str = "") -> None:
    """Refuse a size that is not between 1 and the largest.

    Raises:
        ValueError: with the words that stand before and after what it must be.
    """
    if not 1 <= size <= largest:
        raise ValueError(f"{before} between 1 and {largest}{after}, got {size}")


def integers_of(settings: Mapping[str, Any]) -> tuple[int, int | None]:
    """Return the bits and the group that the settings of a layer name.

    Raises:
        TypeError: if they are no numbers.
    """
    bits, group = settings.get("bits"), settings.get("group")
    if type(bits) is not int or (group is not None and type(group) is not int):
        raise TypeError(f"bits must be a whole number, and group one or null, got {reprlib.repr((bits, group))}")
    return bits, group
