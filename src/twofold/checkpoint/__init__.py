"""Checkpoints: factored models in safetensors that plain ``from_pretrained`` loads after ``import twofold``."""
