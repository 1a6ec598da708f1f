"""Factored layers made known to PEFT."""

from __future__ import annotations

import importlib.util

from twofold.errors import TwofoldError
from twofold.host.quiet import silence


def register() -> bool:
    """Let PEFT's LoRA take a factored layer as a whole, in every way in which PEFT makes or loads an adapter.

    PEFT asks a table which class carries out LoRA. A subclass of PEFT's own takes its place there, which does what PEFT does for
    all layers but ours. Called when a model gets factored layers, so that an adapter loads on it at once.

    Returns:
        Whether PEFT is installed, and can be imported.
    """
    if importlib.util.find_spec("peft") is None:
        return False
    try:
        with silence():  # PEFT loads torchao
            from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType

            from twofold.checkpoint.peft.lora import CompactLoraModel
    except ImportError:  # installed, but broken: models load without it
        return False

    if not issubclass(PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA], CompactLoraModel):
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = CompactLoraModel
    return True


def need_packages(*packages: str) -> None:
    """Refuse to go on without packages of the extra "tune".

    Raises:
        TwofoldError: naming the first one that is not installed, or if PEFT can't be imported.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise TwofoldError(
                f"it needs the package {package}, which is not installed; install it with: pip install 'twofold[tune]'"
            )
    if not register():
        raise TwofoldError(
            "the package peft is installed but can't be imported; install it anew: pip install 'twofold[tune]'"
        )
