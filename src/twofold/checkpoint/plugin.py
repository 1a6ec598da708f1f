"""The plug-in by which transformers loads and saves factored models: ``quant_method: twofold`` in config.json.

It serves every architecture and Auto class: before the weights are loaded, the linear layers that the configuration names are
replaced, on the meta device, by storage layers of the stored kind, size and form.
"""

from __future__ import annotations

import reprlib
from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from twofold.checkpoint.integers import check_loaded, mind_ties
from twofold.checkpoint.kinds import kind_of
from twofold.checkpoint.peft.register import register
from twofold.errors import TwofoldError
from twofold.host.quiet import silence
from twofold.nn.compact import LAYERS, Compact
from twofold.nn.int_matrix import IntMatrix
from twofold.nn.places import hold_bases, replace_module
from twofold.version import __version__

with silence():
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

METHOD = "twofold"
FORMAT_VERSION = 5  # 2: sliced layers, and dense columns; 3: shared bases; 4: integers; 5: kinds by name


@register_quantization_config(METHOD)
class TwofoldConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which modules are smaller, and how: name → settings of its layer, as {"kind": "factored", "rank": r, "form": "rows"}.

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
        self.modules = modules or {}
        self.format_version = format_version
        self.twofold_version = twofold_version
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

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "twofold_version": self.twofold_version,
            "modules": self.modules,
        }


@register_quantizer(METHOD)
class TwofoldQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts smaller layers where the configuration says, and dense ones back on ``dequantize``."""

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
        itself = type(model).__name__ in (
            getattr(model.config, "architectures", None) or ()
        )  # the class that was saved
        found = 0
        shared: dict[str, Any] = {}
        stored_modules = self.quantization_config.modules.items()
        for stored, settings in sorted(stored_modules, key=lambda item: not item[0].startswith(f"{prefix}.")):
            name = _find(stored, modules, prefix)
            if name is None and found and prefix and not stored.startswith(f"{prefix}.") and not itself:
                continue  # a part of another head, which this class does not have
            if name is None:
                raise TwofoldError(
                    f"the checkpoint factorizes {stored}, which {type(model).__name__} does not have; "
                    "its config.json does not fit this model"
                )
            replace_module(model, name, _skeleton(modules[name], name, settings, shared, model))
            found += 1
        hold_bases(model)
        mind_ties(model)
        register()

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Refuse factors of another shape than the configuration says, and those that were not in the checkpoint.

        transformers 5.16 takes tensors of any shape, and all versions leave missing ones random with a warning.

        Raises:
            TwofoldError: naming the first one.
        """
        layers = {name: m for name, m in model.named_modules() if isinstance(m, Compact)}
        children = {
            f"{name}.{child}": getattr(layer, child) for name, layer in layers.items() for child in layer.CHILDREN
        }
        rounded = {name: child for name, child in model.named_modules() if isinstance(child, IntMatrix)}
        check_loaded(rounded)
        children = {name: child for name, child in children.items() if name not in rounded}
        for name, child in children.items():
            expected, found = (child.out_features, child.in_features), tuple(child.weight.shape)
            if found != expected:
                raise TwofoldError(
                    f"size mismatch: the factor {name} in the checkpoint is {found}, its config.json says {expected}; "
                    "fetch the checkpoint again"
                )
        for name, layer in layers.items():
            wrong = layer.index_error()
            if wrong is not None:
                raise TwofoldError(f"{name}.{wrong}; fetch it again")
        factors = {f"{name}.weight": child.weight for name, child in children.items()}
        # Loaded parameters carry this mark; those that transformers filled in do not.
        marked = {name: bool(getattr(p, "_is_hf_initialized", False)) for name, p in factors.items() if not p.is_meta}
        absent = [name for name, loaded in marked.items() if not loaded]
        if absent and len(absent) < len(marked):
            raise TwofoldError(
                f"the checkpoint is not whole: it lacks {len(absent)} factors, first {absent[0]}; fetch it again"
            )
        if self.quantization_config.format_version < FORMAT_VERSION:
            self.describe(model)  # what is saved anew is of today's format

    def describe(self, model: Any) -> None:
        """Write down which layers of a model are factored, and how: what its config.json will say."""
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Compact) and module.KIND}
        self.quantization_config = TwofoldConfig({name: layer.settings() for name, layer in layers.items()})
        mind_ties(model)
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
        """Whether the weights themselves can: factors of floating point can, integers can't."""
        return not any(isinstance(one, dict) and "bits" in one for one in self.quantization_config.modules.values())

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        if isinstance(dtype, str):  # a saved model's config holds the name
            dtype = getattr(torch, dtype.removeprefix("torch."))
        for name, module in list(model.named_modules()):
            if isinstance(module, Compact) and module.KIND:
                replace_module(model, name, module.dense_module(dtype))  # type: ignore[arg-type]
        hold_bases(model)
        mind_ties(model, dense=True)
        return model


def _find(stored: str, modules: dict[str, nn.Module], prefix: str) -> str | None:
    """The module of a stored name, in this model, its base model, or a model with another head."""
    if stored in modules:
        return stored
    if prefix and stored.startswith(f"{prefix}.") and stored.removeprefix(f"{prefix}.") in modules:
        return stored.removeprefix(f"{prefix}.")
    if prefix and f"{prefix}.{stored}" in modules:
        return f"{prefix}.{stored}"
    return None


def _skeleton(module: nn.Module, name: str, settings: Any, shared: dict[str, Any], model: nn.Module) -> Compact:
    """Make the empty storage layer that takes the place of a dense one, on its device.

    Args:
        shared: by names, what the layers before refer to.
    """
    try:
        if not isinstance(settings, dict):
            raise TypeError(f"it must be a mapping, got {reprlib.repr(settings)}")
        return LAYERS.get(kind_of(settings)).empty(module, settings, model, shared)
    except (ValueError, TypeError) as error:
        raise TwofoldError(
            f"the plan of {name or type(model).__name__} in the checkpoint does not fit: {error}"
        ) from error


def attach(model: Any) -> None:
    """Make a model with factored layers save, reload and dequantize as transformers' models do."""
    TwofoldQuantizer(TwofoldConfig()).describe(model)
