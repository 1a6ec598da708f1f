"""The classes that vLLM makes of ``quantization_config`` in config.json. The one file that imports vLLM (0.32)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from twofold.checkpoint.plugin import METHOD
from twofold.checkpoint.plugin import TwofoldConfig as StoredConfig
from twofold.errors import TwofoldError
from twofold.vllm_plugin.shards import INSTEAD, check_modules, factored_names, shards_of
from twofold.vllm_plugin.stores import Stores


class TwofoldConfig(QuantizationConfig):
    """The linear layers of vLLM that are factored: those with at least one shard that the checkpoint's config.json names."""

    def __init__(self, modules: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        check_modules(modules)
        self.modules = modules

    def __repr__(self) -> str:
        return f"TwofoldConfig({len(self.modules)} factored modules)"

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # ordinary matrix products

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TwofoldConfig:
        """Read the quantization settings of config.json.

        Raises:
            TwofoldError: if a newer Twofold wrote it, or vLLM can't hold a module of it.
        """
        return cls(StoredConfig(**config).modules)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules as vLLM's model does. Those that it merges keep their names: ``packed_modules_mapping`` has them."""
        self.modules = hf_to_vllm_mapper.get_rename_mapper().apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how a layer holds its weights; nothing for what is not linear, which vLLM then treats as usual.

        Raises:
            TwofoldError: if the checkpoint factorizes what is not a linear layer in vLLM.
        """
        if not isinstance(layer, LinearBase):
            if prefix in self.modules:
                raise TwofoldError(
                    f"the checkpoint factorizes {prefix}, where vLLM has {type(layer).__name__} and no linear layer; "
                    f"{INSTEAD}"
                )
            return None
        names = factored_names(prefix, self.packed_modules_mapping, self.modules)
        return TwofoldLinearMethod(prefix, names, self.modules) if names else UnquantizedLinearMethod()


@dataclass(eq=False)
class TwofoldLinearMethod(LinearMethodBase):
    """The factors of each shard of a linear layer, and the dense weights of shards that are not factored."""

    prefix: str  # the layer's name in vLLM
    names: Sequence[str]  # of its shards in the checkpoint
    modules: dict[str, dict[str, Any]]  # the settings of the factored ones

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer empty parameters under the names of the checkpoint's tensors. Its bias is vLLM's own.

        Raises:
            TwofoldError: if the layer is cut among devices, or a rank does not fit.
        """
        parts = getattr(layer, "tp_size", 1)
        if parts > 1:
            raise TwofoldError(
                f"the plug-in for vLLM does not cut factored layers among devices, and the tensor parallel size of "
                f"{self.prefix} is {parts}; set --tensor-parallel-size 1, or {INSTEAD}"
            )
        self.stores = Stores(shards_of(self.prefix, self.names, self.modules, input_size, output_partition_sizes))
        self.stores.attach(layer, params_dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.stores.check_loaded()

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,  # (..., n)
        bias: Tensor | None = None,  # (m,)
    ) -> Tensor:  # (..., m)
        return self.stores.product(x, layer, bias)
