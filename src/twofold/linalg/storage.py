"""What a rank stores in a form: numbers, and the integers of an order."""

from __future__ import annotations

from typing import Protocol

from twofold.linalg.gauge import gauge_storage, plain_storage


class Shaped(Protocol):
    """A weight (m, n)."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...


def rank_numbers(form: str, weight: Shaped, rank: int) -> int:
    """The numbers that a rank stores."""
    count = plain_storage if form == "plain" else gauge_storage
    return count(weight.out_features, weight.in_features, rank)


def order_integers(form: str, weight: Shaped) -> int:
    """The integers of the order; for a form not chosen yet, the longer of the two."""
    m, n = weight.out_features, weight.in_features
    return {"rows": m, "columns": n, "gauge": max(m, n)}.get(form, 0)
