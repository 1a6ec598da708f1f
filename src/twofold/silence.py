"""What other libraries have to say while they are loaded, kept out of our output."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

TALKATIVE = ("torchao", "torch.utils._pytree")


@contextmanager
def silence() -> Iterator[None]:
    """Within the block torchao does not warn: transformers loads it, and it names the accelerators that it has no kernel for."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
