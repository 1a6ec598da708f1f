"""The plug-in by which transformers loads and saves factored models: ``quant_method: twofold`` in config.json.

It serves every architecture and Auto class: before the weights are loaded, the linear layers that the configuration names are
replaced, on the meta device, by storage layers of the stored kind, size and form.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from twofold.checkpoint.loaded import check_layers
from twofold.checkpoint.peft.register import register
from twofold.checkpoint.ties import forget_ties, settle_ties, tie
from twofold.errors import TwofoldError
from twofold.host.quiet import silence
from twofold.nn.compact import LAYERS, Compact
from twofold.nn.layers.tied import TiedLinear
from twofold.nn.places import hold_bases, replace_module
from twofold.version import __version__

with silence():
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

METHOD = "twofold"
FORMAT_VERSION = 5  # 2: sliced layers, and dense columns; 3: shared bases; 4: integers; 5: kinds by name
OLD_FORMS = {  # of formats up to 4 → kind
    "kept-rows": "sliced", "kept-columns": "sliced", "dense": "quantized", "corrected": "corrected",
    "embedding": "embedding", "tied": "tied",
}  # fmt: skip
OLD_KEYS = {"basis": "shared", "columns": "dense-columns"}


@register_quantization_config(METHOD)
class TwofoldConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The modules that are smaller, and how: name → settings of its layer, as {"kind": "factored", "rank": r, "form": "rows"}.

    The kinds and what each says are those of twofold.nn.layers. "bits" and "group" say that numbers are integers.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        twofold_version: str | None = __version__,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format_version = format_version
        self.twofold_version = twofold_version
        self.modules = modules or {}
        if not isinstance(self.modules, dict):
            raise TwofoldError(
                f"the factored modules in the model's config.json must be a mapping, got {type(modules).__name__}"
            )
        if type(format_version) is not int or format_version < 1:
            raise TwofoldError(
                f"the format version in the model's config.json must be a whole number, got {format_version!r}"
            )
        if format_version > FORMAT_VERSION:
            raise TwofoldError(
                f"this checkpoint has format version {format_version}, this Twofold reads up to {FORMAT_VERSION}; "
                "install a newer Twofold"
            )


@register_quantizer(METHOD)
class TwofoldQuantizer(HfQuantizer):  # type: ignore[misc]
    """The plug-in: puts smaller layers where the configuration says, and dense ones back on ``dequantize``."""

    requires_calibration = True
    quantization_config: TwofoldConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.replace_modules(model)

    def replace_modules(self, model: nn.Module) -> None:
        """Put an empty factored layer in the place of each dense one that the configuration names.

        Raises:
            TwofoldError: if the model has no such layer, or the rank does not fit it.
        """
        prefix = str(getattr(model, "base_model_prefix", ""))
        modules = dict(model.named_modules())
        same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
        replaced = False
        shared: dict[str, Any] = {}
        layers = self.quantization_config.modules
        for stored in sorted(layers, key=lambda name: not name.startswith(f"{prefix}.")):  # the base model's first
            name = _find(stored, modules, prefix)
            if name is None and replaced and prefix and not stored.startswith(f"{prefix}.") and not same_class:
                continue  # a part of another head, which this class does not have
            if name is None:
                raise TwofoldError(
                    f"the checkpoint factorizes {stored}, which {type(model).__name__} does not have; "
                    "its config.json does not fit this model"
                )
            replace_module(model, name, _skeleton(modules[name], name, layers[stored], shared, model))
            replaced = True
        hold_bases(model)
        forget_ties(model)
        register()

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        check_layers(model)
        settle_ties(model)
        if self.quantization_config.format_version < FORMAT_VERSION:
            self.describe(model)  # what is saved anew is of today's format

    def describe(self, model: Any) -> None:
        """Write down which layers of a model are factored, and how: what its config.json will say."""
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Compact) and module.KIND}
        self.quantization_config = TwofoldConfig({name: layer.settings() for name, layer in layers.items()})
        forget_ties(model)
        settle_ties(model)
        model.config.quantization_config = self.quantization_config
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = METHOD
        register()

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters beside the weights can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves can be trained: factors of floating point can, integers can't."""
        modules = self.quantization_config.modules.values()
        return not any(isinstance(settings, dict) and "bits" in settings for settings in modules)

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        if isinstance(dtype, str):  # a saved model's config holds the name
            dtype = getattr(torch, dtype.removeprefix("torch."))
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Compact) and module.KIND}
        for name, layer in layers.items():
            replace_module(model, name, layer.dense_module(dtype))  # type: ignore[arg-type]
        hold_bases(model)
        tie(model, [f"{name}.weight" for name, layer in layers.items() if isinstance(layer, TiedLinear)])
        return model


def _find(stored: str, modules: dict[str, nn.Module], prefix: str) -> str | None:
    """Find the module of a stored name, in this model, its base model, or a model with another head."""
    names = (stored, stored.removeprefix(f"{prefix}."), f"{prefix}.{stored}") if prefix else (stored,)
    return next((name for name in names if name in modules), None)


def stored_kind(settings: Mapping[str, Any]) -> str:
    """Return the kind of a storage layer; formats up to 4 do not name it, and it follows from what they say."""
    if "kind" in settings:
        return str(settings["kind"])
    form = str(settings.get("form"))
    return OLD_FORMS.get(form) or next((kind for key, kind in OLD_KEYS.items() if key in settings), "factored")


def _skeleton(module: nn.Module, name: str, settings: Any, shared: dict[str, Any], model: nn.Module) -> Compact:
    """Make the empty storage layer that takes the place of a dense one, on its device.

    Args:
        shared: by names, what the layers before it refer to.
    """
    try:
        if not isinstance(settings, dict):
            raise TypeError(f"it must be a mapping, got {reprlib.repr(settings)}")
        return LAYERS.get(stored_kind(settings)).empty(module, settings, model, shared)
    except (ValueError, TypeError) as error:
        raise TwofoldError(
            f"the plan of {name or type(model).__name__} in the checkpoint does not fit: {error}"
        ) from error


def attach(model: Any) -> None:
    """Make a model with factored layers save, reload and dequantize as transformers' models do."""
    TwofoldQuantizer(TwofoldConfig()).describe(model)
