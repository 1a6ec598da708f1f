"""How far a run has come: of an output folder, finished or not."""

from __future__ import annotations

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
from twofold.host.folders import tuned_record
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
        remove: remove the unfinished state, with the moments of an unfinished calibration; what there was is returned.

    Raises:
        TwofoldError: if there is nothing of the kind, a state can't be read, or the run to remove still goes on.
    """
    current = _look(Path(out).expanduser().resolve())
    if remove:
        _remove(current)
    return current


def _look(out: Path) -> Status:
    """Find the status of an output folder."""
    if out.name.endswith(".partial"):
        out = out.with_name(out.name.removesuffix(".partial"))
    finished = (out / "run.json").is_file()
    work = work_folder(out)
    state = read_state(work)
    if state is None:
        if not finished:
            raise TwofoldError(f"there is neither a finished nor an unfinished run in {out}; name the `out` of a run")
        return _finished(out)
    moments = Path(state.moments) if state.moments else None
    return Status(
        out=str(out),
        state="running" if is_running(state) else "stopped",
        stage=state.stage,
        model=state.model,
        work=str(work),
        work_bytes=_bytes(work),
        moments=state.moments,
        moments_done=moments is not None and (moments / DESCRIPTION).is_file(),
        moments_parts=len(list(moments.glob("[!.]*-*.safetensors"))) if moments is not None else 0,
        moments_bytes=_bytes(moments) if moments is not None else 0,
        targets=state.targets,
        decomposed=sum(map(_decomposed, (work / "spectra").glob("spectra-*.safetensors"))),
        parts=len(list((work / "checkpoint").glob("model-*.json"))),
        measured=len(state.measured),
        hours=(time.time() - state.started) / 3600 if state.started else 0.0,
        finished=finished,
    )


def _finished(out: Path) -> Status:
    """Find the status of an output that a compression, a fine-tuning, a merge or an extraction wrote."""
    record = tuned_record(out)
    try:
        if record is None:
            run = Run.model_validate_json((out / "run.json").read_text(encoding="utf-8"))
            model, seconds = run.recipe.model, run.seconds
        else:
            tuned = record["kind"] == "tune"
            model = str(record["settings"]["model"] if tuned else record.get("model", record.get("tuned", "")))
            seconds = record.get("seconds", {})
        hours = float(seconds.get("total", 0.0)) / 3600
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TwofoldError(f"{out / 'run.json'} can't be read; run the command that made {out} again") from error
    return Status(out=str(out), state="finished", model=model, hours=hours, finished=True)


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
    moments = Path(status.moments)
    if status.moments and not status.moments_done and moments.is_dir():
        for path in moments.iterdir():  # a folder that the user named may hold other things
            if FILES.fullmatch(path.name):
                path.unlink(missing_ok=True)
        if not any(moments.iterdir()):
            moments.rmdir()


def _decomposed(path: Path) -> int:
    """Count the weights in a file of spectra."""
    with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
        return sum(name.startswith("values/") for name in file.keys())  # noqa: SIM118
    return 0


def _bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder; what is linked twice counts once."""
    sizes: dict[int, int] = {}
    for path in folder.rglob("*"):
        with suppress(OSError):  # a run that goes on may have removed it
            stat = path.stat()
            if path.is_file():
                sizes[stat.st_ino] = stat.st_size
    return sum(sizes.values())
