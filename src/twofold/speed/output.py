"""The files of a bench: bench.json, roofline.png and roofline.svg, all or none."""

from __future__ import annotations

from pathlib import Path

from twofold.host.folders import staged_folder
from twofold.speed.figure import draw_roofline
from twofold.speed.record import Bench


def write_bench(bench: Bench, out: Path) -> None:
    """Write the files of a bench into a new folder.

    Raises:
        TwofoldError: if the folder exists or can't be written.
    """
    with staged_folder(out) as folder:
        (folder / "bench.json").write_text(bench.model_dump_json(indent=1) + "\n", encoding="utf-8")
        draw_roofline(bench, [folder / "roofline.png", folder / "roofline.svg"])
