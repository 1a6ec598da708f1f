"""Tensors in files that appear whole or not at all, each with a mark of what it belongs to; read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.host.files import write_whole

FORMAT = "twofold-moments-3"


class Parts(Mapping[str, Tensor]):
    """The sums of several files by name; each is read when it is asked for, so that they need not fit in memory."""

    def __init__(self, places: dict[str, Path]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self.places[name]) as file:
            return file.get_tensor(name).clone()  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def subset(sums: Mapping[str, Tensor], names: Set[str]) -> Mapping[str, Tensor]:
    """Return some of the sums by name; what is in files stays there."""
    if isinstance(sums, Parts):
        return Parts({name: sums.places[name] for name in sorted(names)})
    return {name: sums[name] for name in sorted(names)}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a part to read it.

    Raises:
        TwofoldError: if it can't be read.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise TwofoldError(
            f"the moments in {path} can't be read ({error}); delete {path.parent} and run again"
        ) from error


def write_part(path: Path, sums: dict[str, Tensor], fingerprint: str, about: dict[str, str] | None = None) -> None:
    """Write sums to one file, whole or not at all.

    Raises:
        TwofoldError: if the disk does not take them.
    """
    metadata = {"format": FORMAT, "fingerprint": fingerprint, **(about or {})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sums.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_names(path: Path, fingerprint: str) -> tuple[list[str], dict[str, str]]:
    """Read the names in a part, and what else its header says.

    Raises:
        TwofoldError: if it is not whole, or belongs to something else.
    """
    with _opened(path) as file:
        metadata, names = dict(file.metadata() or {}), list(file.keys())
    if metadata.get("format") != FORMAT or metadata.get("fingerprint") != fingerprint:
        raise TwofoldError(f"{path} belongs to other moments; delete {path.parent} and run again")
    return names, metadata


def take_part(path: Path | None, fingerprint: str) -> tuple[Parts, dict[str, str]] | None:
    """Return the sums of a part and what else its header says; None if there is no whole one that belongs here."""
    if path is None:
        return None
    try:
        names, about = read_names(path, fingerprint)
    except TwofoldError:
        return None
    return Parts(dict.fromkeys(names, path)), about
