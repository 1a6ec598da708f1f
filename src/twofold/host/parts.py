"""Tensors in files that appear whole or not at all, each with a mark of what it belongs to; read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.host.files import write_whole

FORMAT = "twofold-moments-3"


class Chosen(Mapping[str, Tensor]):
    """Some of the sums by name."""

    def __init__(self, sums: Mapping[str, Tensor], names: Set[str]) -> None:
        self.sums, self.names = sums, names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.sums[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)


class Parts(Mapping[str, Tensor]):
    """The sums of several files by name; each is read when it is asked for, so that they need not fit in memory."""

    def __init__(self, places: dict[str, Path]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        path = self.places[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name).clone()  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise TwofoldError(
                f"the moments in {path} can't be read ({error}); delete {path.parent} and run again"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def write_part(path: Path, sums: dict[str, Tensor], fingerprint: str, about: dict[str, str] | None = None) -> None:
    """Write sums to one file, whole or not at all.

    Raises:
        TwofoldError: if the disk does not take them.
    """
    metadata = {"format": FORMAT, "fingerprint": fingerprint, **(about or {})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sums.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_names(path: Path, fingerprint: str) -> tuple[list[str], dict[str, str]]:
    """The names in a part, and what else its header says.

    Raises:
        TwofoldError: if it is not whole, or belongs to something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise TwofoldError(
            f"the moments in {path} can't be read ({error}); delete {path.parent} and run again"
        ) from error
    if metadata.get("format") != FORMAT or metadata.get("fingerprint") != fingerprint:
        raise TwofoldError(f"{path} belongs to other moments; delete {path.parent} and run again")
    return names, metadata
