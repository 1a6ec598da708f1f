"""Export formats by name, one file each: a function writes a model to a folder, and returns how to read it there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from twofold.errors import TwofoldError
from twofold.registry import Registry

if TYPE_CHECKING:
    import torch

    from twofold.exports.decoding import Decoder, GraphDecoder
    from twofold.model.load import LoadedModel

EXTRA = "pip install 'twofold[export]'"


@dataclass(frozen=True)
class Source:
    """The model to export, and what the user said beside the format."""

    loaded: LoadedModel
    dtype: torch.dtype  # of the exported weights
    rank: int | None = None
    base: str | None = None
    trust_remote_code: bool = False

    @property
    def model(self) -> Any:
        return self.loaded.model

    def read(self, name: str | Path) -> LoadedModel:
        """Load a model, or what was written, as the model to export was loaded: on the processor, with the same trust in code."""
        from twofold.model.load import load_model

        return load_model(str(name), device="cpu", trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Written:
    """What was written: how it is read again, by the programs that it is for, and what there is to say of it."""

    decoder: Callable[[], Decoder]
    notes: list[str] = field(default_factory=list)
    dtype: str = "float32"  # of the computation that the logits are compared in
    also: tuple[Callable[[], Decoder], ...] = ()  # of what else was written that computes the same


Write: TypeAlias = Callable[[Source, Path], Written]


@dataclass(frozen=True)
class Format:
    """A form that a model is exported in."""

    name: str
    write: Write
    factored: bool = False  # it takes only models with factored layers
    integers: bool = False  # it takes layers of integers, which it merges
    refuse: Callable[[LoadedModel], None] | None = None  # raises for a model that it can't hold, before any work
    needs: tuple[str, ...] = ()  # modules of packages that Twofold does not depend on
    takes: Collection[str] = ()  # the settings beside the format, "rank" and "base", that it reads
    original: bool = False  # it also reads the model that the checkpoint was made from
    beside: tuple[
        str, ...
    ] = ()  # what it takes of the files beside the weights, with the licence (``checkpoint/beside.py``)
    weights: tuple[str, ...] = (".safetensors",)  # the endings of the files that hold weights
    dtypes: tuple[str, ...] = ()  # those that it writes, the default first; none means that of the checkpoint
    graph: str = ""  # the file that a runtime opens with ``decoder`` (path, threads), if it writes a graph
    decoder: Callable[[Path, int | None], GraphDecoder] | None = None

    def check(self) -> None:
        """Refuse what can't be written here, before any work.

        Raises:
            TwofoldError: if a package is missing.
        """
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            are = "is" if len(missing) == 1 else "are"
            raise TwofoldError(f"`to={self.name}` needs {' and '.join(missing)}, which {are} not installed: {EXTRA}")


FORMATS: Registry[Format] = Registry("export format", __name__)


def export_format(name: str, **about: Any) -> Callable[[Write], Write]:
    """Register a function (source, folder) → what was written as a format; the rest is that of ``Format``."""

    def register(function: Write) -> Write:
        FORMATS.add(name, Format(name, function, **about))
        return function

    return register
