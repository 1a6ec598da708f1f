"""Models without their weights: what the configuration alone tells, and what a run without numbers shows."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]

from twofold.checkpoint.plugin import METHOD, TwofoldConfig, TwofoldQuantizer
from twofold.host.quiet import quiet_bars


def empty_model(model_class: Any, config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Make a model with parameters on the meta device, and with its buffers (rotary frequencies and the like) computed."""
    with quiet_bars(), init_empty_weights(include_buffers=False):
        model = model_from_config(model_class, config, trust_remote_code, dtype=dtype)
    return _with_factored_layers(model, config).eval().requires_grad_(False)


def model_on_meta(model_class: Any, config: Any, trust_remote_code: bool) -> Any:
    """Make a model on the meta device, buffers and all."""
    with quiet_bars(), torch.device("meta"):
        model = model_from_config(model_class, config, trust_remote_code)
    return _with_factored_layers(model, config)


def _with_factored_layers(model: Any, config: Any) -> Any:
    """Tie the weights of a skeleton, and give it the factored layers that its configuration names."""
    model.tie_weights()
    settings = getattr(config, "quantization_config", None)
    settings = settings if isinstance(settings, dict) else getattr(settings, "to_dict", dict)()
    if settings.get("quant_method") == METHOD:
        TwofoldQuantizer(TwofoldConfig(**settings)).replace_modules(model)
    return model


def model_from_config(model_class: Any, config: Any, trust_remote_code: bool = False, **settings: Any) -> Any:
    """Make a model from its configuration; an Auto class finds the architecture."""
    if hasattr(model_class, "_from_config"):
        return model_class._from_config(config, **settings)
    return model_class.from_config(config, trust_remote_code=trust_remote_code, **settings)


def is_plain(config: Any, trust_remote_code: bool) -> bool:
    """Say whether the weights are stored as the configuration alone says: there is no code of their own."""
    return not (trust_remote_code and getattr(config, "auto_map", None))


def forget_gguf(model: Any) -> None:
    """Drop what a dequantized GGUF leaves in a model, so that it can be saved as an ordinary one."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
