"""The entry point: adds the quantization method ``twofold`` to vLLM's registry."""

from __future__ import annotations

import warnings

from twofold.checkpoint.plugin import METHOD

WRITTEN_FOR = "0.32"  # the vLLM whose sources the plug-in was written from


def register() -> None:
    """Tell vLLM how checkpoints with ``quant_method: twofold`` are loaded; called again, it does the same again.

    A vLLM that lacks what the plug-in builds on gets a warning, not an error: it may be there for models that are not ours.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from twofold.vllm_plugin.quantization import TwofoldConfig
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"Twofold's plug-in for vLLM was not registered, since this vLLM is not as {WRITTEN_FOR} is ({error}); "
            "vLLM can load what `twofold export DIR --to dense` writes",
            stacklevel=2,
        )
        return
    register_quantization_config(METHOD)(TwofoldConfig)
