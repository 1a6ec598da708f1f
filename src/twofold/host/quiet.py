"""What other libraries have to say while they are loaded, kept out of our output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import TextIOBase
from typing import TextIO

TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")


@contextmanager
def silence(*libraries: str) -> Iterator[None]:
    """Let libraries log errors alone; by default those that warn of accelerators and kernels that they did not find."""
    loggers = [logging.getLogger(name) for name in libraries or TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _WithoutBars(TextIOBase, TextIO):
    """Standard error without what begins a line anew, as bars do, and the end of such a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._bar = stream, False

    def write(self, text: str) -> int:
        self._bar = text.startswith("\r") or (self._bar and text in ("\n", ""))
        return len(text) if self._bar else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Keep transformers' own bars and notes out of our output; also the bar of a GGUF file, which no setting of it turns off."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(_WithoutBars(sys.stderr)):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, with the second if the first ends in a colon; without words, its type.

    Backticks are turned into quotes: in our sentences they mark settings.
    """
    lines = [line.strip().replace("`", "'") for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError):
        return f"it does not know {error}"
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
