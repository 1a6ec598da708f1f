"""How far a run has come: of an output folder, finished or not."""

from __future__ import annotations

import json
import platform
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pydantic
from safetensors import SafetensorError, safe_open

from twofold.calibrate.moments import DESCRIPTION
from twofold.calibrate.states import FILES
from twofold.errors import TwofoldError
from twofold.host.folders import TUNED
from twofold.host.unfinished import is_running, read_state, work_folder
from twofold.report.record import Run


class Status(pydantic.BaseModel, extra="forbid"):
    """What there is of an output."""

    out: str
    state: Literal["finished", "running", "stopped", "nothing"]
    stage: str = ""
    model: str = ""
    work: str = ""  # the folder of the unfinished state
    work_bytes: int = 0
    moments: str = ""  # the folder of the moments
    moments_done: bool = False
    moments_parts: int = 0  # sweeps over some blocks that are finished
    moments_bytes: int = 0
    targets: int = 0  # weights to decompose
    decomposed: int = 0
    parts: int = 0  # parts of the checkpoint that are written
    measured: int = 0  # models measured in the search for the size, where a quality was asked for
    hours: float = 0.0  # since the run began, or that it took
    finished: bool = False  # a finished checkpoint stands in the folder (beside an unfinished one, perhaps)


def status(out: Path | str, *, remove: bool = False) -> Status:
    """Look at an output folder and at the unfinished state beside it.

    Args:
        remove: remove the unfinished state, with the moments of a calibration that was not finished; what there was is returned.

    Raises:
        TwofoldError: if there is nothing of the kind, a state can't be read, or the run still goes on and is not to be removed.
    """
    there = _look(Path(out).expanduser().resolve())
    if remove:
        _remove(there)
    return there


def _look(out: Path) -> Status:
    if out.name.endswith(".partial"):
        out = out.with_name(out.name.removesuffix(".partial"))
    finished = (out / "run.json").is_file()
    work = work_folder(out)
    state = read_state(work)
    if state is None:
        if not finished:
            raise TwofoldError(f"there is neither a finished nor an unfinished run in {out}; name the `out` of a run")
        tuned = tuned_record(out)
        if tuned is not None:
            return tuned
        try:
            run = Run.model_validate_json((out / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TwofoldError(f"{out / 'run.json'} can't be read; compress the model again") from error
        return Status(
            out=str(out),
            state="finished",
            model=run.recipe.model,
            hours=run.seconds.get("total", 0.0) / 3600,
            finished=True,
        )
    moments = Path(state.moments) if state.moments else None
    parts = [p for p in moments.glob("*-*.safetensors") if not p.name.startswith(".")] if moments is not None else []
    return Status(
        out=str(out),
        state="running" if is_running(state) else "stopped",
        stage=state.stage,
        model=state.model,
        work=str(work),
        work_bytes=_bytes(work),
        moments=state.moments,
        moments_done=moments is not None and (moments / DESCRIPTION).is_file(),
        moments_parts=len(parts),
        moments_bytes=_bytes(moments) if moments is not None else 0,
        targets=state.targets,
        decomposed=_decomposed(work / "spectra"),
        parts=len(list((work / "checkpoint").glob("model-*.json"))),
        measured=len(state.measured),
        hours=(time.time() - state.started) / 3600 if state.started else 0.0,
        finished=finished,
    )


def tuned_record(out: Path) -> Status | None:
    """What a folder says that a fine-tuning, a merge or an extraction wrote; None if it is of another kind."""
    try:
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("kind") not in TUNED:
            return None
        model = (
            record["settings"]["model"] if record["kind"] == "tune" else record.get("model", record.get("tuned", ""))
        )
        hours = float(record.get("seconds", {}).get("total", 0.0)) / 3600
        return Status(out=str(out), state="finished", model=str(model), hours=hours, finished=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _remove(status: Status) -> None:
    """Remove the unfinished state of an output."""
    if status.state == "running":
        raise TwofoldError(f"the run of {status.out} still goes on; stop it first")
    state = read_state(work_folder(Path(status.out)))
    if state is not None and state.process and state.host != platform.node():
        raise TwofoldError(
            f"the run of {status.out} was begun on {state.host} and may go on there; if it does not, delete {status.work}"
        )
    if status.state != "stopped":
        raise TwofoldError(f"there is no unfinished run of {status.out}")
    shutil.rmtree(status.work, ignore_errors=True)
    if status.moments and not status.moments_done:
        _remove_unfinished_moments(Path(status.moments))


def _remove_unfinished_moments(folder: Path) -> None:
    """Remove what a calibration left; a folder that the user named may hold other things."""
    for path in folder.iterdir() if folder.is_dir() else []:
        if FILES.fullmatch(path.name):
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _decomposed(folder: Path) -> int:
    count = 0
    for path in folder.glob("spectra-*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                count += sum(name.startswith("values/") for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            continue
    return count


def _bytes(folder: Path) -> int:
    sizes: dict[int, int] = {}
    for path in folder.rglob("*"):
        with suppress(OSError):  # a run that goes on may have removed it
            found = path.stat()
            if path.is_file():
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())
