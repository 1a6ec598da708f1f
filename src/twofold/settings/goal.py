"""Goals: how good a model must stay, where its size is what is asked for: perplexity_at_most 1.1x, kl_at_most 0.05."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, Protocol


class Quality(Protocol):
    """What was measured of a model."""

    @property
    def perplexity(self) -> float: ...
    @property
    def divergence(self) -> float | None: ...


@dataclass(frozen=True)
class Goal:
    """The worst that is allowed: a perplexity, a multiple of the dense model's, or a divergence in nats per token."""

    kind: Literal["perplexity", "times", "divergence"]
    limit: float

    @property
    def setting(self) -> str:
        """How it is asked for."""
        if self.kind == "divergence":
            return f"`kl_at_most={self.limit:g}`"
        return f"`perplexity_at_most={self.limit:g}{'x' if self.kind == 'times' else ''}`"

    def most(self, dense: Quality) -> float:
        """The largest perplexity (or divergence) that meets it."""
        return self.limit * dense.perplexity if self.kind == "times" else self.limit

    def met(self, dense: Quality, found: Quality) -> bool:
        """Whether a model meets it; one whose measure is no number does not."""
        measured = found.divergence if self.kind == "divergence" else found.perplexity
        return measured is not None and measured <= self.most(dense)

    def room(self, dense: Quality) -> float:
        """How far a model may be from the dense one, in nats per token; not above zero if the dense one is no better."""
        return self.limit if self.kind == "divergence" else math.log(self.most(dense) / dense.perplexity)

    def distance(self, dense: Quality, perplexity: float, divergence: float) -> float:
        """How far a model is from the dense one, in the same measure."""
        return divergence if self.kind == "divergence" else math.log(perplexity / dense.perplexity)

    def words(self, dense: Quality) -> str:
        """What it asks of the measured numbers."""
        if self.kind == "divergence":
            return f"a divergence of at most {self.limit:g} nats per token"
        if self.kind == "perplexity":
            return f"a perplexity of at most {self.limit:g} (the dense model has {dense.perplexity:.4g})"
        return f"a perplexity of at most {self.most(dense):.4g}, {self.limit:g} times the dense model's {dense.perplexity:.4g}"


def parse_perplexity(text: str) -> tuple[float, Literal["perplexity", "times"]]:
    """Read a perplexity (25) or a multiple of the dense model's (1.1x).

    >>> parse_perplexity("25")
    (25.0, 'perplexity')
    >>> parse_perplexity("1.1x")
    (1.1, 'times')

    Raises:
        ValueError: if the text is neither, or no model can meet it.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([x×]?)\s*", text)
    if not found:
        raise ValueError("must be a perplexity (25), or times the dense model's (1.1x)")
    number = float(found.group(1))
    if number < 1:
        raise ValueError(
            "must be at least 1x, which is the dense model itself" if found.group(2) else "must be at least 1"
        )
    return number, "times" if found.group(2) else "perplexity"
