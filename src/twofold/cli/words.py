"""Sentences of the program as the command line says them: with flags in the place of settings."""

from __future__ import annotations

import re

SETTING = re.compile(r"`([a-z][a-z_]*)(?:=([^`]*))?`")


def with_flags(sentence: str) -> str:
    """Turn the settings of a sentence, which stand between backticks, into flags.

    >>> with_flags("give `keep=0.8`, or leave `eval_windows` out")
    'give --keep 0.8, or leave --eval-windows out'
    """

    def flag(found: re.Match[str]) -> str:
        name = "--" + found.group(1).replace("_", "-")
        return name if found.group(2) is None else f"{name} {found.group(2)}"

    return SETTING.sub(flag, sentence)


def one_line(error: Exception) -> str:
    """What an error says, as one line without what a terminal would obey: it may hold names from a checkpoint."""
    words = with_flags(" ".join(str(error).split()))
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in words)
