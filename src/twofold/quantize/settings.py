"""How numbers are stored: in which form, and in how many bits."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from twofold.calibrate.settings import Calibrating
from twofold.nn.bits import BITS, GROUP
from twofold.settings.base import Settings

REST_BITS = 8  # of the embeddings, where a budget shares out ranks and bits together


def _bits_or(word: str) -> pydantic.BeforeValidator:
    """Return the validator of a number of bits or a word."""

    def check(value: object) -> object:
        text = str(value) if isinstance(value, int) else value
        if isinstance(text, str) and text not in (word, *map(str, BITS)):
            raise ValueError(f"must be {word}, or a whole number from {BITS[0]} to {BITS[-1]}")
        return text

    return pydantic.BeforeValidator(check)


class Integers(Settings):
    """How factors are stored."""

    TITLE = "Storage"

    form: Annotated[
        Literal["gauge", "plain"], Field(description="how factors are stored: gauge r(m+n-r) numbers, plain r(m+n)")
    ] = "gauge"
    bits: Annotated[
        str | None,
        _bits_or("auto"),
        Field(
            description="bits of the factors' numbers, 2 to 8, or auto: a budget in bytes is shared out over ranks and bits "
            "together; without it they keep the dtype of the checkpoint"
        ),
    ] = None
    dense_bits: Annotated[
        str | None,
        _bits_or("none"),
        Field(
            description="bits of the embedding, the output layer and the linear layers that stay dense, 2 to 8; none leaves "
            "them as they are, and is the default; with `bits=auto` that is 8"
        ),
    ] = None
    group_size: Annotated[
        int, Field(ge=8, description="inputs that share a scale, below 8 bits; with 8 bits all of an output do")
    ] = GROUP

    @property
    def fixed_bits(self) -> int | None:
        """The bits of every factor, if they are one number."""
        return None if self.bits is None or self.bits == "auto" else int(self.bits)

    @property
    def rest_bits(self) -> int | None:
        """The bits of what is not factorized; where bits are shared out, of the embeddings and the layers that are no targets."""
        return REST_BITS if self.bits == "auto" and self.dense_bits is None else self.kept_bits

    @property
    def kept_bits(self) -> int | None:
        """The bits of a target that stays dense, where the budget does not choose them."""
        return None if self.dense_bits is None or self.dense_bits == "none" else int(self.dense_bits)

    def group(self, bits: int) -> int | None:
        """Return the inputs that share a scale at so many bits; None: all of an output."""
        return None if bits == 8 else self.group_size


class Stored(Calibrating, Integers):
    """All that what is measured of a weight depends on."""
