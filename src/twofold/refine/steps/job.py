"""What a refinement works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from twofold.calibrate.moments import Moments
from twofold.errors import TwofoldError
from twofold.model.frozen import no_cache
from twofold.model.load import LoadedModel
from twofold.nn.places import dense_again
from twofold.objectives import Objective
from twofold.planning.plan import Plan
from twofold.refine import Stages
from twofold.task.quality import measure_quality


@dataclass(frozen=True)
class Job:
    """What a refinement works on."""

    loaded: LoadedModel  # with factored layers
    replaced: Mapping[str, nn.Module]  # the dense layers that they took the place of
    plan: Plan  # as it was carried out; a refinement that changes a form writes it there
    moments: Moments | None
    objective: Objective
    windows: Tensor  # (count, window), to train on
    held_out: Tensor  # (count, window), to stop on; may be empty
    recipe: Stages
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
                f"{type(self.model).__name__} gives no token logits, so it can't be refined; leave `refine` out"
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
