"""Where Twofold keeps what it can use again: moments, sampled texts, the built-in model."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return TWOFOLD_CACHE, or else XDG_CACHE_HOME/twofold, or else ~/.cache/twofold."""
    if folder := os.environ.get("TWOFOLD_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "twofold"
