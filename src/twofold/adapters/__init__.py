"""LoRA on factored layers: trained, saved and loaded by PEFT, merged exactly by growing the rank; and LoRA out of two models."""

from twofold.checkpoint.peft.register import register

__all__ = ["register"]
