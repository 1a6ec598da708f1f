"""What other libraries have to say while they are loaded, kept out of our output."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")


@contextmanager
def silence() -> Iterator[None]:
    """Within the block torchao and bitsandbytes do not warn of the accelerators and kernels that they have not found."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
