"""The plug-in by which vLLM serves factored checkpoints on its own models. Experimental: vLLM itself was never run with it.

vLLM calls ``register`` in each of its processes (entry point group ``vllm.general_plugins``). Only ``quantization.py`` imports
vLLM at its head.
"""

from twofold.vllm_plugin.entry import register

__all__ = ["register"]
