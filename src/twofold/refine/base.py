"""What a refinement is: it changes the factors of a model that is in memory, and tells what that cost and gained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
from torch import Tensor, nn

from twofold.calibrate.moments import Moments
from twofold.errors import TwofoldError
from twofold.model.frozen import no_cache
from twofold.model.load import LoadedModel
from twofold.nn.places import dense_again
from twofold.objectives.base import Objective
from twofold.planning.plan import Plan
from twofold.settings.recipe import Recipe
from twofold.task.quality import measure_quality


class Refined(pydantic.BaseModel, extra="forbid"):
    """What one refinement did."""

    method: str
    steps: int  # of the optimizer
    planned: int  # steps, which the rates of all steps follow
    tokens: int  # seen in training, repeats counted
    parameters: int  # trained
    seconds: float
    unit: str  # of the two losses, which are of held-out calibration text
    loss_before: float
    loss_after: float
    ended: str  # why it ended, in words

    @property
    def words(self) -> str:
        """What it did, in a sentence without its full stop."""
        return (
            f"refined by {self.method}: {self.steps:,} of {self.planned:,} steps over {self.tokens:,} tokens "
            f"in {self.seconds / 60:.1f} minutes changed {self.parameters:,} parameters; on held-out calibration text "
            f"the loss went from {self.loss_before:.4f} to {self.loss_after:.4f} {self.unit} ({self.ended})"
        )


@dataclass(frozen=True)
class Task:
    """What a refinement works on."""

    loaded: LoadedModel  # with factored layers
    replaced: Mapping[str, nn.Module]  # the dense layers that they took the place of
    plan: Plan  # as it was carried out; a refinement that changes a form writes it there
    moments: Moments | None
    objective: Objective
    windows: Tensor  # (count, window), to train on
    held_out: Tensor  # (count, window), to stop on; may be empty
    recipe: Recipe
    seconds: float | None = None  # that it may take
    folder: Path | None = None  # where its unfinished state is kept
    mark: str = ""  # what the state belongs to
    quiet: bool = False

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tested(self) -> Tensor:  # (count, window)
        """The windows that decide: the held-out ones, or the first of all where the text is too short to have any."""
        return self.held_out if len(self.held_out) else self.windows[:1]

    def logits(self, ids: Tensor) -> Tensor:  # (count, length) to (count, length, vocabulary)
        """What the factored model predicts.

        Raises:
            TwofoldError: if it gives no token logits.
        """
        out = getattr(self.model(input_ids=ids.to(self.model.device), **no_cache(self.model)), "logits", None)
        if not isinstance(out, Tensor) or out.dim() != 3:
            raise TwofoldError(
                f"{type(self.model).__name__} gives no token logits, so it can't be refined; leave --refine out"
            )
        return out

    def dense_logits(self, ids: Tensor) -> Tensor:
        """What the dense model predicts."""
        with dense_again(self.model, dict(self.replaced)):
            return self.logits(ids)

    def divergence(self) -> float:
        """Of the factored model from the dense one on the windows that decide, in nats per token."""
        found = measure_quality([self.dense_logits, self.logits], self.tested, quiet=True)[1].divergence
        assert found is not None
        return found


Need = Literal["chain", "inputs"]
Refine = Callable[[Task], Refined]


@dataclass(frozen=True)
class Refinement:
    """A refinement by its name.

    ``needs``: "chain", a model whose blocks follow one another; "inputs", an objective that looks at whole inputs. All need token
    logits, by which they are judged. ``trains``: it learns the windows by steps, and so may learn them by heart.
    """

    name: str
    needs: frozenset[Need]
    run: Refine
    trains: bool = True


REFINEMENTS: dict[str, Refinement] = {}


def refinement(name: str, *, needs: Iterable[Need] = (), trains: bool = True) -> Callable[[Refine], Refine]:
    """Register a function that refines a model in place."""

    def register(function: Refine) -> Refine:
        REFINEMENTS[name] = Refinement(name, frozenset(needs), function, trains)
        return function

    return register


def get_refinement(name: str) -> Refinement:
    """The refinement of a name.

    Raises:
        TwofoldError: if there is none.
    """
    if name not in REFINEMENTS:
        raise TwofoldError(f"there is no refinement {name!r}; choose of {', '.join(sorted(REFINEMENTS))}")
    return REFINEMENTS[name]
