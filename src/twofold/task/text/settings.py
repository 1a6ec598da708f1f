"""Which texts a model is calibrated on, and which it is measured on."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from twofold.settings.base import Settings, as_list

HELD_OUT = 8  # windows set aside to measure on, or to stop a refinement on
OF_ROWS = {"text_column", "chat", "skip_bad", "bos"}  # settings of reading that hold for a text to measure on, too


class Reading(Settings):
    """How rows of files and data sets are read, whatever they are for."""

    TITLE = "Rows"

    dataset_config: Annotated[str | None, Field(description="the configuration of the data set")] = None
    dataset_split: Annotated[str, Field(description="the split of the data set")] = "train"
    text_column: Annotated[str, Field(description="the field of a row that holds its text")] = "text"
    chat: Annotated[
        bool, Field(description="put prompt and completion rows through the chat template, as one turn each")
    ] = False
    skip_bad: Annotated[bool, Field(description="leave out rows that can't be read, and count them")] = False


class Texts(Reading):
    """What a model is calibrated on."""

    TITLE = "Calibration"

    calibration: Annotated[
        list[str],
        pydantic.BeforeValidator(as_list),
        Field(
            description="text files, or data set names; 'self' samples texts from the model, 'demo' is a few texts in the package"
        ),
    ] = ["self"]
    self_texts: Annotated[
        Literal["both", "plain", "chat"],
        Field(
            description="how texts sampled from the model begin: plain, chat (with a user's turn of the chat template), or both"
        ),
    ] = "both"
    tokens: Annotated[int, Field(ge=1, description="tokens to calibrate on")] = 65536
    continuations: Annotated[
        int,
        Field(ge=0, description="tokens that the model writes on from the calibration texts, to be calibrated on too"),
    ] = 0
    window: Annotated[int, Field(ge=2, description="tokens in a calibration window")] = 512
    bos: Annotated[
        Literal["auto", "none"],
        Field(
            description="how windows begin: auto, with the special tokens that the tokenizer begins a text with (such as <bos>), "
            "if it does; none, with text"
        ),
    ] = "auto"
    seed: Annotated[int, Field(ge=0, description="of sampled texts and labels")] = 0

    @property
    def all_tokens(self) -> int:
        """The tokens to calibrate on, those of the texts and those that the model writes on."""
        return self.tokens + self.continuations


class Measuring(Settings):
    """What a model is measured on."""

    TITLE = "Measuring"

    eval_text: Annotated[
        str | None, Field(description="text file to measure on; without it, held-out calibration text")
    ] = None
    eval_windows: Annotated[int, Field(ge=0, description="windows to measure on; 0 measures nothing")] = 4
