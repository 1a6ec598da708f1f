"""The errors that Twofold raises for its users."""

from __future__ import annotations


class TwofoldError(ValueError):
    """Something that the user can put right: a path, a text, a budget, a checkpoint.

    The message is one clear sentence that says what is wrong and what to do. The command line
    prints it and ends with exit code 2; every other exception is a failure of ours (exit code 1).
    """
