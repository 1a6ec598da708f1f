"""The words of the page and of explanations, in English and Spanish: one table, which the page's script has too (web/)."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files

from twofold.errors import TwofoldError
from twofold.report import formats

LANGUAGES = ("en", "es")
SIGNS = str.maketrans(",.", ".,")


@cache
def _table() -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = json.loads(
        files("twofold.report").joinpath("messages.json").read_text(encoding="utf-8")
    )
    return table


class Words:
    """What is said in one language, with numbers as it writes them.

    Args:
        language: ``en`` or ``es``.

    Raises:
        TwofoldError: if there is no such language.
    """

    def __init__(self, language: str = "en") -> None:
        if language not in LANGUAGES:
            raise TwofoldError(f"there is no language {language!r}; choose among {', '.join(LANGUAGES)}")
        self.language = language

    def say(self, key: str, **values: object) -> str:
        """Return the words of a key of messages.json, with the values put where they stand in braces."""
        return re.sub(r"\{(\w+)\}", lambda hole: str(values[hole[1]]), _table()[key][self.language])

    def told(self, text: str) -> str:
        """Return what the program says in a few words, as a reason or the name of a stage, in this language if it is known."""
        known = _table().get(f"said.{text}")
        return text if known is None else known[self.language]

    def nats(self, prediction: str) -> str:
        """Return the unit of a divergence."""
        return self.say("unit.nats", prediction=self.told(prediction))

    def _signed(self, text: str) -> str:
        """Write a number of English as the language does: 12,345.6 is 12.345,6 in Spanish."""
        if self.language == "en":
            return text
        return re.sub(r"^(−?-?\d),(\d{3})(?![,\d])", r"\1\2", text).translate(SIGNS)

    def number(self, value: float | None, digits: int = 3) -> str:
        """Write a number in ``digits`` significant digits."""
        return self._signed(formats.number(value, digits))

    def percent(self, share: float | None, digits: int = 1) -> str:
        """Write a share as a percentage."""
        return self._signed(formats.percent(share, digits))

    def count(self, value: int) -> str:
        """Write an integer with its thousands apart."""
        return self._signed(formats.count(value))

    def millions(self, value: float) -> str:
        """Write a number of parameters, in millions unless it is small."""
        return self._signed(formats.millions(value))

    def megabytes(self, value: float) -> str:
        """Write a number of bytes, in decimal units."""
        return self._signed(formats.megabytes(value))

    def duration(self, seconds: float) -> str:
        """Write a time span."""
        return self._signed(formats.duration(seconds))


ENGLISH = Words()
