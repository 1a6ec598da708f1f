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
from typing_extensions import Self

from twofold.nn.int_matrix import IntLinear
from twofold.registry import Registry


def bare_linear(
    in_features: int, out_features: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear:
    """Return an ``nn.Linear`` without a bias; on the meta device nothing is initialized, which is slow there."""
    if not torch.empty(0, device=device).is_meta:
        return nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = in_features, out_features
    layer.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
    layer.register_parameter("bias", None)
    return layer


def counted(length: int, device: torch.device | str | None) -> Tensor:  # (length,), int32
    """Return 0, 1, 2, …; on the meta device just its shape, since ``torch.arange`` is slow there."""
    order = torch.empty(length, device=device, dtype=torch.int32)
    return order if order.is_meta else torch.arange(length, device=device, dtype=torch.int32)


class Compact(nn.Module):
    """A module that stores a weight in fewer numbers or bits than the dense layer whose place it takes.

    ``CHILDREN`` name the modules that hold its numbers. ``weight`` is a buffer of one element, a guard: a program that does not
    know the layer finds a weight of the wrong shape in the checkpoint and stops, where it would else start from random weights.
    """

    KIND: ClassVar[str] = ""  # by which config.json names it; "" for what belongs to other layers
    CHILDREN: ClassVar[tuple[str, ...]] = ()
    FORMS: ClassVar[tuple[str, ...]] = ()  # that it may have; the first one, where config.json says none

    weight: Tensor

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

    def settings(self) -> dict[str, Any]:
        """Return what config.json says of the layer, beside its shape."""
        raise NotImplementedError

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
    """y = W′x + b with W′ (out, in) kept in fewer than out · in numbers, by ``nn.Linear`` children.

    ``NUMBERS`` are the settings that are whole numbers, each with what it is, in words.
    """

    NUMBERS: ClassVar[Mapping[str, str]] = {}

    bias: nn.Parameter | None
    bits: int | None = None  # of the children's numbers, where they are integers
    group: int | None = None  # inputs that share a scale; None: all of an output

    def __init__(self, in_features: int, out_features: int, form: str, transposed: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.form, self.transposed = form, transposed

    @classmethod
    def empty(cls, module: nn.Module, settings: Mapping[str, Any], model: nn.Module, shared: dict[str, Any]) -> Self:
        check_settings(settings, cls.NUMBERS, {"kind", "form", "bits", "group"})
        given: dict[str, Any] = {name: settings[name] for name in cls.NUMBERS}
        in_features, out_features = linear_shape(module)
        form = form_of(settings, cls.FORMS)
        layer = cls(in_features, out_features, form=form, **given, **place_of(module))  # type: ignore[arg-type]
        if "bits" in settings or "group" in settings:
            layer.hold_integers(*integers_of(settings))
        return layer

    def _finish(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Add the bias and the guard, behind the children."""
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @torch.no_grad()
    def _fill(self, bias: Tensor | None, **numbers: Tensor) -> Self:
        """Give a layer that was made on the meta device its numbers: of children by their names, and of buffers."""
        for name, value in numbers.items():
            place = getattr(self, name)
            target: Any = place.weight if isinstance(place, nn.Module) else place
            target.copy_(value)
        self.weight.zero_()
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        return self

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
            made = children.get(name) or IntLinear(old.out_features, old.in_features, bits, group, old.weight.device)
            if (made.rows, made.columns) != (old.out_features, old.in_features):
                raise ValueError(
                    f"{name} must be {(old.out_features, old.in_features)}, got {(made.rows, made.columns)}"
                )
            setattr(self, name, made)
        self.bits, self.group = bits, group

    @property
    def shape(self) -> list[int]:
        return [self.out_features, self.in_features]

    @property
    def keep(self) -> float:
        """The numbers that represent the weight over out · in."""
        return self.numbers / (self.out_features * self.in_features)

    def settings(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in self.NUMBERS}
        integers = {} if self.bits is None else {"bits": self.bits, "group": self.group}
        return {"kind": self.KIND, **numbers, "form": self.form, **integers}

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


def place_of(module: nn.Module) -> dict[str, Any]:
    """Return how a layer must be made to take the place of a linear one: bias, layout, device and dtype."""
    weight: Any = module.weight
    bias = getattr(module, "bias", None) is not None
    return {"bias": bias, "transposed": isinstance(module, Conv1D), "device": weight.device, "dtype": weight.dtype}


def check_settings(settings: Mapping[str, Any], numbers: Mapping[str, str], others: set[str]) -> None:
    """Refuse settings of a layer whose numbers are none, or that there are not.

    Raises:
        TypeError: with what it must have.
    """
    wrong = [words for key, words in numbers.items() if type(settings.get(key)) is not int]
    unknown = settings.keys() - numbers.keys() - others
    if unknown and not numbers:
        raise TypeError(f"it may have {', '.join(sorted(others))} alone, and not {reprlib.repr(min(unknown))}")
    if wrong or unknown:
        whole = " and ".join(f"a whole number as {words}" for words in wrong or numbers.values())
        raise TypeError(f"it must have {whole}, and a form, got {reprlib.repr(dict(settings))}")


def form_of(settings: Mapping[str, Any], forms: tuple[str, ...]) -> str:
    """Return the form that the settings of a layer name, or else the first one.

    Raises:
        ValueError: if there is none of that name.
    """
    form = settings.get("form", forms[0])
    if form not in forms:
        raise ValueError(f"the form must be one of {', '.join(forms)}, got {reprlib.repr(form)}")
    return str(form)


def integers_of(settings: Mapping[str, Any]) -> tuple[int, int | None]:
    """Return the bits and the group that the settings of a layer name.

    Raises:
        TypeError: if they are no numbers.
    """
    bits, group = settings.get("bits"), settings.get("group")
    if type(bits) is not int or (group is not None and type(group) is not int):
        raise TypeError(f"bits must be a whole number, and group one or null, got {reprlib.repr((bits, group))}")
    return bits, group
