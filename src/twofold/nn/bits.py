"""How many bits an integer may have, and how many of them share a scale."""

from __future__ import annotations

BITS = range(2, 9)  # that a code may have
GROUP = 64  # inputs that share a scale, below eight bits; why: docs/quantize.md


def default_group(bits: int) -> int | None:
    """Return the inputs that share a scale at so many bits; None: all of an output."""
    return None if bits == 8 else GROUP
