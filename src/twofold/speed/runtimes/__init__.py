"""What runs a model, by name, one file each: load a model or an exported folder, then read a prompt and write tokens."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from twofold.errors import TwofoldError
from twofold.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from twofold.model.work import TokenWork


@dataclass(frozen=True)
class Settings:
    """How a model is loaded to be timed."""

    dtype: str = "auto"
    device: str = "auto"
    optimize: bool = True  # factored models in their inference form
    trust_remote_code: bool = False
    quiet: bool = False


class State(Protocol):
    """Sequences that are being written."""

    token: Tensor  # (batch, 1), the last one of each


class Session(Protocol):
    """A model that is ready to run. Tokens are chosen greedily, and sequences never end by themselves."""

    positions: int | None  # the longest sequence, None if there is no limit
    vocabulary: int
    dtype: str
    weight_bytes: int  # in memory
    work: TokenWork | None  # what it moves and multiplies; None if that is not known
    notes: list[str]

    def begin(
        self,
        ids: Tensor,  # (batch, length)
        room: int,  # tokens that may be written behind them
    ) -> State:
        """Read prompts and choose the first token of each."""
        ...

    def step(self, state: State) -> None:
        """Write one token more to each sequence."""
        ...


class Runtime(ABC):
    """Loads and runs models. ``load`` is what is timed as loading; ``session`` makes ready what was loaded."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()  # that must be installed
    extra: ClassVar[str] = ""  # of twofold, which installs them

    def why_not(self, model: str, settings: Settings) -> str | None:
        """Say why it can't run a model or folder of this name, told without loading it; None if it may."""
        return None

    def check(self, models: list[str], settings: Settings) -> None:
        """Refuse settings that it can't follow for these models, before any work.

        Raises:
            TwofoldError: with what to change.
        """
        return

    def context(self, model: str, settings: Settings) -> int | None:
        """Return the longest sequence of a model that ``places`` takes long for; None if there is no limit, or no such work."""
        return None

    def places(
        self,
        models: list[str],
        settings: Settings,
        folder: Path,  # an empty one, which is removed after the bench
    ) -> dict[str, str]:
        """Return what is loaded in the place of each model: itself, or what is made of it for this runtime."""
        return {model: model for model in models}

    @abstractmethod
    def load(self, model: str, settings: Settings) -> Any: ...

    @abstractmethod
    def session(self, loaded: Any, settings: Settings) -> Session: ...

    @abstractmethod
    def disk_bytes(self, loaded: Any) -> int | None:
        """Return the bytes of the weight files; None if they are on no disk."""


RUNTIMES: Registry[Runtime] = Registry("runtime", __name__)
Kind = TypeVar("Kind", bound=Runtime)


def runtime(kind: type[Kind]) -> type[Kind]:
    """Add a runtime to those that can be named."""
    RUNTIMES.add(kind.name, kind())
    return kind


def get_runtime(name: str) -> Runtime:
    """Return the runtime of a name.

    Raises:
        TwofoldError: if there is none, or what it needs is not installed; it names the extra.
    """
    runtime = RUNTIMES.get(name)
    missing = [package for package in runtime.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise TwofoldError(
            f"the runtime {name} needs {' and '.join(missing)}, not installed: pip install 'twofold[{runtime.extra}]', or leave "
            "it out of `runtime`"
        )
    return runtime


def greedy(
    logits: Tensor,  # (batch, length, vocabulary)
) -> Tensor:  # (batch, 1)
    """Return the most likely next tokens."""
    return logits[:, -1].argmax(-1, keepdim=True)
