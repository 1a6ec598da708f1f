"""The dial: how much work a run may be, from which tokens (or samples), refinement and its minutes follow.

The levels are from what was measured on SmolLM2-135M (docs/methods.md, "How much effort").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from twofold.refine import Stages


@dataclass(frozen=True)
class Level:
    """What one level of effort stands for."""

    tokens: int
    samples: int  # in their place, where a task reads no windows of text
    refine: tuple[str, ...] = ()
    minutes: float | None = None


EFFORTS = {
    "fast": Level(16384, 64),
    "balanced": Level(65536, 256, ("distill",), 10.0),
    "best": Level(131072, 512, ("distill",), 25.0),
}
PARTS = ("tokens", "samples", "refine", "minutes")  # in this order: the minutes are those of the refinement


class Dial(Stages):
    """How much work a run may be."""

    TITLE = "Refinement"

    effort: Annotated[
        Literal["fast", "balanced", "best"] | None,
        Field(
            description="one dial for tokens (or samples), refinement and its minutes: fast, balanced or best; a part that "
            "is named too comes first"
        ),
    ] = None

    def chosen(self, name: str) -> bool:
        """Say whether a setting was given, and is not what it would be without; a part of the effort is as the effort has it."""
        if self.effort is not None and name in PARTS:
            return bool(getattr(self, name) != parts_of(self.effort, self)[name])
        return super().chosen(name)


D = TypeVar("D", bound=Dial)


def parts_of(effort: str, settings: Dial) -> dict[str, Any]:
    """Return what an effort stands for beside the other settings: factors of integers are not refined."""
    level = EFFORTS[effort]
    parts: dict[str, Any] = {"tokens": level.tokens, "samples": level.samples, "refine": [], "minutes": None}
    if settings.bits is None:
        parts["refine"] = list(level.refine)
        parts["minutes"] = level.minutes if settings.refine_steps is None else None
    return parts


def at_effort(settings: D, effort: str) -> D:
    """Return the same settings at another effort; the parts that were named stay as they are."""
    parts = parts_of(effort, settings)
    parts |= {name: getattr(settings, name) for name in PARTS if settings.chosen(name)}
    if not parts["refine"] and not settings.chosen("minutes"):
        parts["minutes"] = None
    return settings.model_copy(update={"effort": effort, **parts})


def effort_words(settings: Dial, streams: bool) -> str:
    """Say what the effort of a recipe stands for."""
    return f"effort {settings.effort}: {effort_parts(settings, streams)}"


def effort_parts(settings: Dial, streams: bool) -> str:
    """Say which parts of an effort a recipe has.

    Args:
        streams: whether the model reads windows of tokens, and not samples.
    """
    size = f"tokens {settings.tokens}" if streams else f"samples {settings.samples}"
    words = [size, f"refine {','.join(settings.refine)}" if settings.refine else "no refinement"]
    if settings.refine and settings.refine_steps is not None:
        words.append(f"{settings.refine_steps} steps")
    elif settings.refine and settings.minutes is not None:
        words.append(f"{settings.minutes:g} minutes")
    return ", ".join(words)
