"""A model that is ready to be worked on: how it is loaded, and what it is for."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.errors import TwofoldError
from twofold.model.blocks import Chain
from twofold.model.load import LoadedModel
from twofold.model.streamed import Streamed
from twofold.objectives import without_data
from twofold.task import Task, find_task


@dataclass
class Opened:
    """A model that is ready to be worked on, and how it is: whole in memory, or some blocks at a time."""

    loaded: LoadedModel
    blocks: int | None = None  # in memory at once; None: all
    named: str = "auto"  # the task, as it is asked for

    @property
    def chain(self) -> Chain | None:
        residence = self.loaded.residence
        return residence.chain if isinstance(residence, Streamed) else None

    @property
    def task(self) -> Task | None:
        """What the model is for; None if it is for nothing that is known."""
        return find_task(self.loaded.model, self.named)

    def need_task(self, what: str = "") -> Task:
        """Return what the model is for.

        Args:
            what: can't be done without; calibration if nothing is said.

        Raises:
            TwofoldError: if it is for nothing that is known.
        """
        task = self.task
        if task is None:
            remedy = f"{what} yet" if what else f"calibrated yet; {without_data()}"
            raise TwofoldError(
                f"{type(self.loaded.model).__name__} is an encoder-decoder model, which can't be {remedy}"
            )
        return task
