"""Checkpoints: factored models in safetensors that plain ``from_pretrained`` loads after ``import twofold``."""

from twofold.checkpoint.plugin import TwofoldConfig, TwofoldQuantizer, attach
from twofold.host.folders import staged_folder

__all__ = ["TwofoldConfig", "TwofoldQuantizer", "attach", "staged_folder"]
