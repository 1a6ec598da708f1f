"""From texts to token windows to moments."""

from twofold.calibrate.moments import Moments, Request, request_statistics
from twofold.calibrate.sweep import collect_moments
from twofold.task.sampled import sample_texts
from twofold.task.texts import TokenWindows, read_texts, token_windows, wikitext_rows

__all__ = [
    "Moments",
    "Request",
    "TokenWindows",
    "collect_moments",
    "read_texts",
    "request_statistics",
    "sample_texts",
    "token_windows",
    "wikitext_rows",
]
