"""A stand-in for the parts of vLLM 0.32 that the plug-in meets: the same names, and the same way to load weights.

vLLM itself is not installed where these tests run. What is here was written anew. What the plug-in calls, and what vLLM calls of
it, has the signatures of vLLM's sources; the layers are made in a shorter way than there.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CLASSES: dict[str, type] = {}  # what register_quantization_config was given
PARALLEL = {"size": 1}  # devices that a model is cut among


def register_quantization_config(quantization: str):
    def registered(cls):
        if not issubclass(cls, QuantizationConfig):
            raise ValueError("no QuantizationConfig")
        CLASSES[quantization] = cls
        return cls

    return registered


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: nn.Module, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer: nn.Module, *args, **kwargs) -> Tensor: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class QuantizationConfig(ABC):
    def __init__(self):
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig: ...

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None: ...

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper):
        return


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ): ...

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor: ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ):
        layer.weight = nn.Parameter(
            torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype), False
        )
        layer.weight.weight_loader = extra_weight_attrs["weight_loader"]

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """Any linear layer of vLLM, with the sizes of the parts that it merges."""

    def __init__(self, input_size: int, output_sizes: list[int], bias: bool, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.tp_size = PARALLEL["size"]
        self.output_sizes, self.prefix = output_sizes, prefix
        self.quant_method = quant_config.get_quant_method(self, prefix)
        if self.quant_method is None:
            raise ValueError("All linear layers should support quant method.")
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size,
            output_partition_sizes=[size // self.tp_size for size in output_sizes],
            input_size=input_size,
            output_size=sum(output_sizes),
            params_dtype=torch.get_default_dtype(),
            weight_loader=self.weight_loader,
        )
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(sum(output_sizes)), requires_grad=False)
            self.bias.weight_loader = self.weight_loader

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        """Rows of a shard, as vLLM's own layers load their dense weights and biases."""
        if loaded_shard_id is None:
            assert param.shape == loaded_weight.shape
            param.data.copy_(loaded_weight)
            return
        place = {"q": 0, "k": 1, "v": 2}.get(loaded_shard_id, loaded_shard_id)
        rows = param.data.narrow(0, sum(self.output_sizes[:place]), self.output_sizes[place])
        assert rows.shape == loaded_weight.shape
        rows.copy_(loaded_weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)


class MergedLinear(LinearBase):
    """QKVParallelLinear and MergedColumnParallelLinear: they find the parameter and call its loader with the shard's id."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        for name, loaded_weight in weights:
            module, _, attribute = name.rpartition(".")
            parameter = getattr(self.get_submodule(module), attribute)
            parameter.weight_loader(parameter, loaded_weight, getattr(loaded_weight, "shard_id", None))
            yield name


class RowLinear(LinearBase):
    """RowParallelLinear: AutoWeightsLoader walks to the parameter and calls its loader without an id."""


class WeightsMapper:
    """Renames prefixes; names of merged parts become the merged name, with a shard id on the tensor."""

    def __init__(self, stacked: dict[str, tuple[str, Any]], prefixes: dict[str, str] | None = None) -> None:
        self.stacked, self.prefixes = stacked, prefixes or {}

    def get_rename_mapper(self) -> WeightsMapper:
        return WeightsMapper({}, self.prefixes)

    def map(self, name: str) -> tuple[str, Any]:
        shard_id = None
        for old, (new, one) in self.stacked.items():
            if old in name:
                name, shard_id = name.replace(old, new, 1), one
        for old, new in self.prefixes.items():
            if name.startswith(old):
                name = name.replace(old, new, 1)
        return name, shard_id

    def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        return {self.map(name)[0]: value for name, value in values.items()}

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            new, shard_id = self.map(name)
            if shard_id is not None:
                tensor.shard_id = shard_id
            yield new, tensor


LLAMA = WeightsMapper(
    {
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        ".gate_proj": (".gate_up_proj", 0),
        ".up_proj": (".gate_up_proj", 1),
    }
)
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def load(layers: dict[str, LinearBase], weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Hand each tensor to its layer as AutoWeightsLoader does; those that belong to no layer come back."""
    others = {}
    for name, tensor in LLAMA.apply(weights):
        owner = next((prefix for prefix in layers if name.startswith(f"{prefix}.")), None)
        if owner is None:
            others[name] = tensor
            continue
        layer, rest = layers[owner], name.removeprefix(f"{owner}.")
        if isinstance(layer, MergedLinear):
            list(layer.load_weights([(rest, tensor)]))
            continue
        module, _, attribute = rest.rpartition(".")
        parameter = dict(layer.get_submodule(module).named_parameters(recurse=False))[attribute]
        parameter.weight_loader(parameter, tensor)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
    return others


OURS = "twofold.vllm_plugin.quantization"


@contextmanager
def installed() -> Iterator[None]:
    """``import vllm`` gives this file's classes, under the names that vLLM has them."""
    linear, base = "vllm.model_executor.layers.linear", "vllm.model_executor.layers.quantization.base_config"
    contents = {
        "vllm": [],
        "vllm.model_executor": [],
        "vllm.model_executor.layers": [],
        "vllm.model_executor.layers.quantization": [register_quantization_config],
        base: [QuantizationConfig, QuantizeMethodBase],
        linear: [LinearBase, LinearMethodBase, UnquantizedLinearMethod],
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        for member in members:
            setattr(module, member.__name__, member)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in (*contents, OURS):
            sys.modules.pop(name, None)
        CLASSES.clear()
