"""The smallest input of a model, made of its configuration alone: to see how it runs, whatever it takes."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from twofold.model.blocks import has_two_stacks

IDS = 8  # token ids in it
SAMPLES = 4000  # of a wave, a quarter of a second


def example_of(model: Any, count: int = IDS) -> dict[str, Tensor]:
    """Return a batch of one sample that the model runs on, always the same: ids, pixels, a spectrogram or a wave."""
    takes = inspect.signature(model.forward).parameters
    config, generator = model.config, torch.Generator().manual_seed(0)
    main = getattr(model, "main_input_name", "input_ids")
    batch: dict[str, Tensor] = {}
    if main == "input_features":
        length = 2 * int(getattr(config, "max_source_positions", 50))
        batch[main] = torch.randn(1, int(getattr(config, "num_mel_bins", 80)), length, generator=generator)
    elif main == "input_values":
        batch[main] = torch.randn(1, SAMPLES, generator=generator)
    if main == "pixel_values" or (main == "input_ids" and _sees(model, takes)):
        batch["pixel_values"] = torch.randn(1, *_picture(config), generator=generator)
    if main == "input_ids":
        batch[main] = _ids(model, count, generator)
    if has_two_stacks(model):
        batch["decoder_input_ids"] = _ids(model, count, generator)
    return batch


def _sees(model: Any, takes: Any) -> bool:
    """Say whether a model of text wants pictures, too, and can't do without."""
    return "pixel_values" in takes and not getattr(model, "can_generate", lambda: False)()


def _picture(config: Any) -> tuple[int, int, int]:
    """Return the channels, height and width of a picture."""
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 224)
    size = size.values() if isinstance(size, dict) else size
    height, width = tuple(size)[:2] if not isinstance(size, int) else (size, size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def _ids(model: Any, count: int, generator: torch.Generator) -> Tensor:
    table = None
    with suppress(NotImplementedError, AttributeError):  # a model of several inputs
        table = model.get_input_embeddings()
    size = getattr(table, "num_embeddings", None) or getattr(model.config.get_text_config(), "vocab_size", 256)
    return torch.randint(int(size or 256), (1, count), generator=generator)
