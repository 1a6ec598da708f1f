"""The compressed models of one original in a folder, each a size to choose, with the page of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from twofold.errors import TwofoldError
from twofold.host.folders import COMPRESSED
from twofold.planning.plan import Plan
from twofold.report.explorer import stored_data
from twofold.report.messages import Words
from twofold.report.page import page_text
from twofold.report.record import Run


@dataclass(frozen=True)
class Size:
    """A compressed model and its record."""

    name: str
    folder: Path
    run: Run
    plan: Plan

    @property
    def told(self) -> dict[str, Any]:
        """What the page is told of it."""
        return {"name": self.name, "keep": self.run.keep, "bytes": self.run.bytes_after}

    def page(self, server: Mapping[str, Any], words: Words) -> str:
        """Make the page anew from the record: no script and no markup that lies in the folder comes into it.

        Args:
            server: what the page is told of the program that serves it.

        Raises:
            TwofoldError: if the spectra can't be read.
        """
        path = self.folder / "spectra.safetensors"
        try:
            spectra = load_file(path) if path.is_file() else {}
        except (SafetensorError, OSError) as error:
            raise TwofoldError(f"{path} can't be read ({error}); run the compression again, or delete it") from error
        live = stored_data(self.folder / "report.html")
        return page_text(self.run.recipe, self.plan, spectra, live, self.run, words=words, server=server)


def find_sizes(folder: Path) -> list[Size]:
    """Find the compressed models in a folder, the largest first: it is one itself, or holds several.

    Raises:
        TwofoldError: if there is none, a record can't be read, or they are of different originals.
    """
    if not folder.is_dir():
        raise TwofoldError(f"there is no folder {folder}; name the `out` of twofold compress")
    folder = folder.resolve()
    places = [folder] if _is_compressed(folder) else sorted(filter(_is_compressed, folder.iterdir()))
    if not places:
        raise TwofoldError(
            f"there is no compressed model in {folder}; name the `out` of twofold compress, or a folder that holds several"
        )
    sizes = [_read(place) for place in places]
    originals = sorted({size.run.recipe.model for size in sizes})
    if len(originals) > 1:
        raise TwofoldError(
            f"the models in {folder} are of several originals ({', '.join(originals)}); name a folder of sizes of one"
        )
    return sorted(sizes, key=lambda size: -size.run.bytes_after)


def _is_compressed(folder: Path) -> bool:
    return all((folder / name).is_file() for name in COMPRESSED)


def _read(folder: Path) -> Size:
    """Read the record of a compressed model."""
    record = folder / "run.json"
    try:
        run = Run.model_validate_json(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TwofoldError(f"{record} is not the record of a compression by this version of Twofold") from error
    return Size(folder.name, folder, run, Plan.load(folder / "plan.json"))
