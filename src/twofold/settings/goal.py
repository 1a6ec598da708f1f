"""Goals: how good a model must stay while its size is searched for: perplexity_at_most 1.1x, kl_at_most 0.05."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, Protocol


class Quality(Protocol):
    """What was measured of a model."""

    @property
    def perplexity(self) -> float | None: ...
    @property
    def divergence(self) -> float | None: ...


@dataclass(frozen=True)
class Goal:
    """The worst that is allowed: a perplexity, a multiple of the dense model's, or a divergence in nats a prediction."""

    kind: Literal["perplexity", "times", "divergence"]
    limit: float

    @property
    def setting(self) -> str:
        """The setting that asks for it."""
        if self.kind == "divergence":
            return f"`kl_at_most={self.limit:g}`"
        return f"`perplexity_at_most={self.limit:g}{'x' if self.kind == 'times' else ''}`"

    def most(self, dense: Quality) -> float:
        """Return the largest perplexity (or divergence) that meets the goal."""
        return self.limit * _perplexity(dense) if self.kind == "times" else self.limit

    def of(self, measured: Quality) -> float | None:
        """Return the measured number that it is about."""
        return measured.divergence if self.kind == "divergence" else measured.perplexity

    def met(self, dense: Quality, factored: Quality) -> bool:
        """Say whether a model meets the goal; NaN never does."""
        measured = self.of(factored)
        return measured is not None and measured <= self.most(dense)

    def room(self, dense: Quality) -> float:
        """Return how far a model may be from the dense one, in nats a prediction; above zero only if the goal leaves room."""
        return self.limit if self.kind == "divergence" else math.log(self.most(dense) / _perplexity(dense))

    def distance(self, dense: Quality, measured: float) -> float:
        """Return how far a model is from the dense one by the number that ``of`` gives, in the measure of ``room``."""
        return measured if self.kind == "divergence" else math.log(measured / _perplexity(dense))

    def words(self, dense: Quality, prediction: str = "token") -> str:
        """Say what it asks of the measured numbers.

        Args:
            prediction: what one is called.
        """
        if self.kind == "divergence":
            return f"a divergence of at most {self.limit:g} nats per {prediction}"
        perplexity = _perplexity(dense)
        if self.kind == "perplexity":
            return f"a perplexity of at most {self.limit:g} (the dense model has {perplexity:.4g})"
        return (
            f"a perplexity of at most {self.most(dense):.4g}, {self.limit:g} times the dense model's {perplexity:.4g}"
        )


def _perplexity(dense: Quality) -> float:
    assert dense.perplexity is not None  # else the goal was refused before any work
    return dense.perplexity


def parse_perplexity(text: str) -> tuple[float, Literal["perplexity", "times"]]:
    """Read a perplexity (25) or a multiple of the dense model's (1.1x).

    >>> parse_perplexity("25")
    (25.0, 'perplexity')
    >>> parse_perplexity("1.1x")
    (1.1, 'times')

    Raises:
        ValueError: if the text is neither, or no model can meet it.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([x×]?)\s*", text)
    if not match:
        raise ValueError("must be a perplexity (25), or times the dense model's (1.1x)")
    number, times = float(match[1]), match[2]
    if number < 1:
        raise ValueError("must be at least 1x, which is the dense model itself" if times else "must be at least 1")
    return number, "times" if times else "perplexity"
