"""Where Twofold keeps what it can use again: moments, sampled texts, the built-in model."""

from __future__ import annotations

import os
from pathlib import Path

from twofold.errors import TwofoldError


def cache_folder() -> Path:
    """Return TWOFOLD_CACHE, or else XDG_CACHE_HOME/twofold, or else ~/.cache/twofold.

    Raises:
        TwofoldError: if there is no home, and none is named.
    """
    try:
        if folder := os.environ.get("TWOFOLD_CACHE"):
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "twofold"
    except RuntimeError as error:
        raise TwofoldError(f"the cache has no place ({error}); name a folder with TWOFOLD_CACHE") from error
