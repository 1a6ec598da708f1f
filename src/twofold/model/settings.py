"""How a model is loaded, on which machine, and which of its weights are worked on."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from twofold.errors import TwofoldError
from twofold.settings.base import Settings


class Loading(Settings):
    """Which model, and how it is loaded."""

    TITLE = "Model and machine"

    model: Annotated[str, Field(description="a folder, a hub id, a .gguf file, or smollm2 (built in)")]
    revision: Annotated[str | None, Field(description="the revision of a hub model")] = None
    trust_remote_code: Annotated[bool, Field(description="run code that comes with the checkpoint")] = False
    dequantize: Annotated[
        bool, Field(description="turn weights that are quantized already into ordinary ones as they are loaded")
    ] = False
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        Field(description="of the loaded weights; auto is float32 on a processor"),
    ] = "auto"
    device: Annotated[str, Field(description="where to run: cpu, cuda, mps, or auto")] = "auto"
    memory: Annotated[
        str | None,
        Field(description="memory that may be used, as 6GB; a model that needs more is worked through block by block"),
    ] = None
    stream: Annotated[
        Literal["auto", "always", "never"],
        Field(description="whether to work block by block with the weights on disk; auto if the model does not fit"),
    ] = "auto"
    activations: Annotated[
        Literal["disk", "memory"],
        Field(description="where hidden states are kept between blocks; on disk a killed run goes on from them"),
    ] = "disk"


class Override(pydantic.BaseModel, extra="forbid"):
    """A choice that is forced on the weights that match a pattern: one of keep, rank, dense."""

    keep: float | None = Field(None, gt=0, le=1)
    rank: int | None = Field(None, ge=1)
    dense: bool = False

    @pydantic.model_validator(mode="after")
    def _exactly_one(self) -> Override:
        if (self.keep is not None) + (self.rank is not None) + self.dense != 1:
            raise ValueError("an override needs exactly one of keep, rank, dense")
        return self


class Weights(Settings):
    """Which weights are factorized."""

    TITLE = "Weights"

    include: Annotated[list[str], Field(description="factorize only the layers that match these patterns")] = []
    exclude: Annotated[list[str], Field(description="leave the layers that match these patterns dense")] = []
    overrides: Annotated[
        dict[str, Override],
        Field(description="pattern=dense, pattern=rank:64 or pattern=keep:0.5; the last match wins"),
    ] = {}


def parse_override(text: str) -> tuple[str, dict[str, object]]:
    """Read PATTERN=dense, PATTERN=rank:64 or PATTERN=keep:0.5.

    Raises:
        TwofoldError: if it is none of these.
    """
    pattern, _, value = text.rpartition("=")
    key, _, number = value.partition(":")
    with suppress(ValueError):
        if pattern and key == "dense" and not number:
            return pattern, {"dense": True}
        if pattern and key in ("rank", "keep"):
            return pattern, {key: int(number) if key == "rank" else float(number)}
    raise TwofoldError(
        f"the override {text!r} is not understood: write PATTERN=dense, PATTERN=rank:64 or PATTERN=keep:0.5"
    )
