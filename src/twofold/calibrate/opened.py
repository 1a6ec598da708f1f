"""A model that is ready to be worked on: how it is loaded, and what it is for."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.errors import TwofoldError
from twofold.model.blocks import Chain
from twofold.model.load import LoadedModel
from twofold.model.streamed import Streamed
from twofold.objectives import without_data
from twofold.task import TASKS, S, Task, find_task


@dataclass
class Opened:
    """A model that is ready to be worked on, and how it is: whole in memory, or some blocks at a time."""

    loaded: LoadedModel
    blocks: int | None = None  # in memory at once; None: all
    named: str = "auto"  # the task, as it is asked for
    own: Task | None = None  # the task of a caller, in the place of a named one

    @property
    def chain(self) -> Chain | None:
        residence = self.loaded.residence
        return residence.chain if isinstance(residence, Streamed) else None

    @property
    def task(self) -> Task | None:
        """What the model is for; None if it is for nothing that is known."""
        return self.own or find_task(self.loaded.model, self.named)

    def fitted(self, settings: S, *, quiet: bool = False) -> S:
        """Return settings that suit the model, as its task has it."""
        return settings if self.task is None else self.task.fitted(settings, self.loaded, quiet=quiet)

    def need_task(self, what: str = "") -> Task:
        """Return what the model is for.

        Args:
            what: can't be done without; calibration if nothing is said.

        Raises:
            TwofoldError: if it is for nothing that is known.
        """
        task = self.task
        if task is None:
            remedy = what or f"calibrated; {without_data()}"
            raise TwofoldError(
                f"{type(self.loaded.model).__name__} is for none of the tasks {', '.join(TASKS.names())}, so it can't be {remedy}"
            )
        return task
