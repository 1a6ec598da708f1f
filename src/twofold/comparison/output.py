"""The files of a comparison: compare.json, compare.csv, compare.md, compare.png and compare.svg, all or none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from twofold.comparison.figure import draw_front
from twofold.comparison.record import Comparison
from twofold.comparison.tables import csv_table, markdown
from twofold.errors import TwofoldError


def write_output(comparison: Comparison, out: Path) -> None:
    """Write the files of a comparison beside its cells.

    Raises:
        TwofoldError: if the disk does not take them; then those of an earlier run are left as they were.
    """
    staged = out / f".{os.getpid()}.output"
    try:
        staged.mkdir(exist_ok=True)
        (staged / "compare.json").write_text(comparison.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (staged / "compare.csv").write_text(csv_table(comparison), encoding="utf-8", newline="")
        (staged / "compare.md").write_text(markdown(comparison), encoding="utf-8")
        draw_front(comparison, [staged / "compare.png", staged / "compare.svg"])
        for path in sorted(staged.iterdir()):
            path.replace(out / path.name)
    except OSError as error:
        raise TwofoldError(f"the tables can't be written to {out}: {error}; free some space and run again") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
