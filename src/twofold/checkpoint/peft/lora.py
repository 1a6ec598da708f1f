"""PEFT's LoRA on a factored layer as a whole: y = W′x + b + s B A x, with W′ kept in its factors.

Merging grows the rank, exactly: [left, s B] [right; A]. Undoing it puts the former layer back, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from twofold.checkpoint.peft.grow import grow
from twofold.errors import TwofoldError
from twofold.nn.compact import Compact, CompactLinear

INITS = ("gaussian", "eva", "orthogonal")  # those that need no dense weight, besides True and False


class CompactLora(LoraLinear):
    """LoRA on a layer that takes the place of a dense one."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.base_layer: nn.Module
        self.fan_in_fan_out = False  # the factors are (out, in), whatever the dense layer was
        self._before: list[nn.Module] = []  # the base layer before each merge; PyTorch does not look into a list

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, CompactLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            TwofoldError: if the method needs the dense weight.
        """
        init = config.init_lora_weights
        method = f"the start {init!r}" if isinstance(init, str) and init not in INITS else ""
        try:
            other_kind = self.resolve_lora_variant(config=config) is not None
        except ValueError:
            other_kind = True
        if other_kind or method:
            raise TwofoldError(
                f"{method or 'this kind of LoRA'} needs the dense weight, which a factored layer does not have; take lora, "
                "rslora, eva, factors-top or factors-tail, or make the model dense first (model.dequantize())"
            )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base layer, whose rank grows by theirs.

        Raises:
            TwofoldError: if the layer can't hold them in its form.
            ValueError: if an adapter holds NaN or infinity, and ``safe_merge`` asks for a look.
        """
        for name in check_adapters_to_merge(self, adapter_names) or []:
            if name not in self.lora_A:
                continue
            down, up = self.lora_A[name].weight, self.lora_B[name].weight * self.scaling[name]
            if safe_merge and not (torch.isfinite(down).all() and torch.isfinite(up).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            layer: nn.Module = self.base_layer
            bias = self.lora_B[name].bias * self.scaling[name] if self.lora_bias[name] else None
            grown = grow(layer, up, down, bias)
            trained = any(parameter.requires_grad for parameter in layer.parameters())
            self._before.append(layer)
            self.base_layer = grown.requires_grad_(trained).train(layer.training)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back the base layer as it was before the merges."""
        if self._before:
            self.base_layer = self._before[0]
        self._before.clear()
        self.merged_adapters.clear()


class CompactLoraModel(LoraModel):
    """PEFT's LoRA, which knows the factored layers too."""

    @staticmethod
    def _create_new_module(
        lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, CompactLinear):
            return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)  # type: ignore[no-any-return]
        if kwargs.pop("parameter_name", None) is not None:
            raise TwofoldError(
                "an adapter can't take a single parameter of a factored layer; name the layer as a target"
            )
        kwargs.pop("device_map", None)
        return CompactLora(target, adapter_name, config=lora_config, **kwargs)

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        """Make a factored layer one target of "all-linear", where PEFT would take each of its factors."""
        super()._prepare_model(peft_config, model)
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear" and has_compact(model):
            peft_config.target_modules = set(whole_layers(model))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        quantizer = getattr(model, "hf_quantizer", None)
        if has_compact(model) and quantizer is not None:
            quantizer.describe(model)  # what config.json says of the ranks
        return model  # type: ignore[no-any-return]


def has_compact(model: nn.Module) -> bool:
    """Say whether a model has layers of ours."""
    return any(isinstance(module, CompactLinear) for module in model.modules())


def whole_layers(model: nn.Module) -> list[str]:
    """Return the names of all linear layers of a model but the output layer; a factored one counts as a whole."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    wholes: tuple[str, ...] = ()
    names = []
    for name, module in model.named_modules():
        if name.startswith(wholes):
            continue
        if isinstance(module, Compact | BaseTunerLayer):
            wholes = (*wholes, f"{name}.")
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, CompactLinear | nn.Linear | Conv1D) and base is not output:
            names.append(name)
    return names
