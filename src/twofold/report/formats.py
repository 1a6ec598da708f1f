"""How numbers are written for people."""

from __future__ import annotations

import math

from twofold.host import progress

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NONE = "–"
GAP = "\u00a0"  # keeps a number and its unit on one line


def power_of_ten(exponent: int) -> str:
    """Write 10 to an integer power, as in 10⁻³."""
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def number(value: float | None, digits: int = 3) -> str:
    """Write a number in ``digits`` significant digits; very large and very small ones as a power of ten.

    >>> number(22.876), number(0.0000123), number(61234567.0), number(None)
    ('22.9', '1.23·10⁻⁵', '6.12·10⁷', '–')
    """
    if value is None:
        return NONE
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "−infinite"
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(power)
    if -4 <= exponent < 5:
        return f"{value:,.{max(digits - 1 - exponent, 0)}f}"
    return f"{mantissa}·{power_of_ten(exponent)}"


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share as a percentage."""
    return NONE if share is None else f"{100 * share:.{digits}f}{GAP}%"


def count(value: int) -> str:
    """Write an integer with its thousands apart."""
    return f"{value:,}"


def millions(value: float) -> str:
    """Write a number of parameters, in millions unless it is small."""
    if abs(value) >= 1e5:
        return f"{value / 1e6:,.2f}{GAP}M"
    return f"{value / 1e3:,.1f}{GAP}k" if abs(value) >= 1e3 else f"{value:.0f}"


def megabytes(value: float) -> str:
    """Write a number of bytes, in decimal units."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return f"{value / size:,.{1 if value < 100 * size else 0}f}{GAP}{unit}"
    return f"{value:.0f}{GAP}B"


def duration(seconds: float) -> str:
    """Write a time span.

    >>> duration(0.034), duration(14.49), duration(3700)
    ('0.03\xa0s', '14.5\xa0s', '1\xa0h 2\xa0min')
    """
    return progress.duration(seconds, GAP)


def fraction(part: float, whole: float) -> float:
    """Return part / whole; 1 if there is no whole."""
    return part / whole if whole else 1.0
