"""Sizes as people write them: 90M, 180MB, 70%."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Literal

from twofold.errors import TwofoldError

Unit = Literal["parameters", "bytes"]
PARAMETERS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_budget(text: str) -> tuple[float, Literal["parameters", "bytes", "share"]]:
    """Read 90M, 1.2B (parameters), 180MB, 1.5GiB (bytes), 70% or 0.7 (share of the whole model).

    >>> parse_budget("90M")
    (90000000.0, 'parameters')
    >>> parse_budget("180MB")
    (180000000.0, 'bytes')
    >>> parse_budget("70%")
    (0.7, 'share')

    Raises:
        TwofoldError: if the text is none of these.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]*)\s*", text)
    if match:
        number, unit = float(match[1]), match[2].upper()
        if unit == "%":
            return number / 100, "share"
        if unit == "" and 0 < number <= 1:
            return number, "share"
        if unit in PARAMETERS:
            return number * PARAMETERS[unit], "parameters"
        if unit in BYTES:
            return number * BYTES[unit], "bytes"
    raise TwofoldError(
        f"the budget {text!r} is not understood: give parameters (90M), bytes (180MB) or a share of the whole model (70%)"
    )


def parse_bytes(text: str, setting: str) -> float:
    """Read a number of bytes, such as 6GB, which a setting is given as.

    >>> parse_bytes("6GB", "memory")
    6000000000.0

    Raises:
        TwofoldError: if the text is none.
    """
    with suppress(TwofoldError):
        number, unit = parse_budget(text)
        if unit == "bytes":
            return number
    raise TwofoldError(f"`{setting}` must be a size in bytes, as in `{setting}=6GB`, got {text!r}")
