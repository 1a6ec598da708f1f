"""GGUF: not written here."""

from __future__ import annotations

from pathlib import Path

from twofold.errors import TwofoldError
from twofold.export.base import Source, Written, export_format


@export_format("gguf")
def write_gguf(source: Source, folder: Path) -> Written:
    """Refuse."""
    raise TwofoldError("no; use --to dense")
