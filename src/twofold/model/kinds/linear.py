"""Linear layers: ``nn.Linear``, GPT-2's ``Conv1D``, which keeps its weight as (in, out), and the layers that stand for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.model.head import output_layer
from twofold.model.kinds import Kind, Sink, kind
from twofold.model.target import Target
from twofold.nn.compact import CompactLinear
from twofold.nn.layers.factored import FactoredLinear

# Modules of PyTorch whose fast paths hand the weights of their layers to one operation, past the layers.
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
READ_AS_IT_IS = "PyTorch's fast path reads this weight as it is"


@kind
class LinearKind(Kind):
    """y = W x + b."""

    name = "linear"

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear | Conv1D)

    def dense(self, module: nn.Module) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.T if isinstance(module, Conv1D) else weight

    def target(self, name: str, module: nn.Module) -> Target:
        return replace(super().target(name, module), transposed=isinstance(module, Conv1D))

    def reason(self, model: nn.Module, module: nn.Module, parent: nn.Module) -> str | None:
        if module is output_layer(model):
            return "output embedding: left dense for now"
        if isinstance(parent, READERS):
            return READ_AS_IT_IS
        if type(module) is not nn.Linear and not isinstance(module, Conv1D):
            return f"unsupported layer type {type(module).__name__}"
        return None

    def layer(self, module: nn.Module, left: Tensor, right: Tensor, form: str, dtype: torch.dtype) -> CompactLinear:
        bias: Any = getattr(module, "bias", None)
        transposed = isinstance(module, Conv1D)
        return FactoredLinear.from_factors(left, right, bias, form, transposed, dtype=dtype)  # type: ignore[arg-type]

    def watch(self, module: nn.Module, sink: Sink) -> list[Any]:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = input_of(args, kwargs)
            if sink.starts and torch.is_grad_enabled() and not x.requires_grad:
                x = x.detach().requires_grad_(True)
            return (x,), {}  # by position, since PyTorch shows the gradients of no others

        def watched(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
            @torch.no_grad()
            def product() -> Tensor:
                bias = module.bias
                return output - bias if isinstance(bias, Tensor) else output

            take = None if sink.calls is None else sink.calls(input_of(args, kwargs), product)
            if take is not None and output.requires_grad:
                output.register_hook(lambda g: take(g) and None)  # type: ignore[no-untyped-call]

        def handed_back(module: nn.Module, grad_input: tuple[Tensor | None, ...], grad_output: Any) -> None:
            if grad_input[0] is not None and sink.input_gradients is not None:
                sink.input_gradients(grad_input[0])

        handles: list[Any] = [module.register_forward_hook(watched, with_kwargs=True)]
        if sink.starts or sink.input_gradients is not None:
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        if sink.input_gradients is not None:
            handles.append(module.register_full_backward_hook(handed_back))
        return handles


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a call of a linear layer, by position or by keyword."""
    x = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(x, Tensor)
    return x
