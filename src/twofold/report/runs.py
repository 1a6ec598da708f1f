"""Runs side by side: a row a run, and which of their figures may stand on one axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic

from twofold.errors import TwofoldError
from twofold.host.folders import tuned_record
from twofold.planning.plan import Plan
from twofold.report.names import is_path, model_title, without_paths
from twofold.report.record import Measured, Run

HIGHER = {"accuracy", "bleu", "chrf", "spearman", "nearest_neighbour"}  # scores of which more is better
LOWER = {"wer"}
SCORES = sorted(HIGHER | LOWER)  # that the same data gives again, as it does no time
SAME = 1e-3  # figures of the original that differ by less are of the same data: other threads sum in another order


class RunRow(pydantic.BaseModel, extra="forbid"):
    """What one run made of its model."""

    number: int  # of the run, from 1, in the order in which they were named
    name: str  # of its folder
    keep: float  # the share of the factorized weights
    keep_model: float
    parameters: int
    bytes: int  # of the whole model
    objective: str
    allocate: str
    form: str
    bits: str | None
    refine: list[str]
    predicted_divergence: float | None  # nats a prediction
    divergence: float | None  # as measured
    perplexity: float | None
    perplexity_ratio: float | None  # over that of the original
    scores: dict[str, float | None]  # the task's own measures
    measured_on: str | None  # in words
    seconds: float | None
    moments_reused: bool  # the time has no calibration in it
    peak_memory: int | None  # bytes, resident


class Panel(pydantic.BaseModel, extra="forbid"):
    """Size against one measure, of the runs that may be compared by it."""

    measure: Literal["divergence", "perplexity", "predicted"]
    on: str  # what it was measured on, in words
    points: dict[int, tuple[int, float]]  # number of the run → bytes and the measure, of which less is better
    front: list[int]  # the runs that no other beats in both, the smallest first


class RunGroup(pydantic.BaseModel, extra="forbid"):
    """The runs of one original at one task."""

    model: str
    task: str
    prediction: str
    parameters: int  # of the original
    bytes: int
    perplexity: float | None  # of the original, where all were measured on the same data
    scores: dict[str, float | None]
    same_data: bool  # all that were measured were measured on the same data
    same_calibration: bool
    same_machine: bool
    rows: list[RunRow]
    panels: list[Panel]


class RunsReport(pydantic.BaseModel, extra="forbid"):
    """Runs side by side, and the page that shows them."""

    page: str
    groups: list[RunGroup]


@dataclass(frozen=True)
class StoredRun:
    """The record of a run in its folder."""

    number: int
    name: str
    folder: Path
    run: Run
    plan: Plan

    @property
    def original(self) -> tuple[object, ...]:
        """What tells its original and task from others."""
        model = self.run.recipe.model
        place = str(Path(model).expanduser().resolve()) if is_path(model) else model
        return place, self.run.recipe.revision, self.run.task, self.run.parameters_before


def read_runs(folders: Sequence[Path | str]) -> list[StoredRun]:
    """Read the records of runs.

    Raises:
        TwofoldError: if a folder holds none, is named twice, or holds one that can't be read.
    """
    places = [Path(folder).expanduser() for folder in folders]
    resolved = [place.resolve() for place in places]
    for i, place in enumerate(resolved):
        if place in resolved[:i]:
            raise TwofoldError(f"{places[i]} is named twice; name each run once")
    names = _told_apart(resolved)
    return [
        StoredRun(i, name, place, *_record(place)) for i, (name, place) in enumerate(zip(names, places, strict=True), 1)
    ]


def _told_apart(places: Sequence[Path]) -> list[str]:
    """Name folders by as few of their last parts as tell them apart."""
    names: list[str] = []
    for count in range(1, max((len(place.parts) for place in places), default=0) + 1):
        names = ["/".join(part.strip("/") for part in place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _record(folder: Path) -> tuple[Run, Plan]:
    record = folder / "run.json"
    if not folder.is_dir():
        raise TwofoldError(f"there is no folder {folder}; name the `out` of twofold compress")
    if (other := tuned_record(folder)) is not None:
        raise TwofoldError(f"{folder} was written by twofold {other['kind']}; name the `out` of twofold compress")
    if not record.is_file():
        held = any(folder.glob("*/run.json"))
        raise TwofoldError(
            f"{folder} is no run but holds some; name each of them, as in {folder}/*/"
            if held
            else f"{folder} has no run.json, so it is no run; name the `out` of twofold compress"
        )
    try:
        run = Run.model_validate_json(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TwofoldError(f"{record} is not the record of a compression by this version of Twofold") from error
    return run, Plan.load(folder / "plan.json")


def grouped(runs: Sequence[StoredRun]) -> list[list[StoredRun]]:
    """Put the runs of each original together, in the order in which they were named."""
    groups: dict[tuple[object, ...], list[StoredRun]] = {}
    for stored in runs:
        groups.setdefault(stored.original, []).append(stored)
    return list(groups.values())


def group_of(runs: Sequence[StoredRun]) -> RunGroup:
    """Set the runs of one original side by side."""
    first = runs[0]
    measured = [stored.run.quality for stored in runs if stored.run.quality is not None]
    same = all(_same_data(measured[0], quality) for quality in measured)
    original = measured[0] if measured and same else None
    return RunGroup(
        model=model_title(first.run.recipe.model),
        task=first.run.task,
        prediction=first.plan.prediction,
        parameters=first.run.parameters_before,
        bytes=first.run.bytes_before,
        perplexity=None if original is None else original.original.get("perplexity"),
        scores={} if original is None else {name: before for name, (before, _) in original.scores.items()},
        same_data=same,
        same_calibration=len({stored.run.calibration_sha256 for stored in runs}) == 1,
        same_machine=len({_machine(stored.run) for stored in runs}) == 1,
        rows=[_row(stored) for stored in runs],
        panels=_panels(runs),
    )


def _machine(run: Run) -> tuple[object, ...]:
    m = run.machine
    return m.system, m.device, m.threads, m.dtype


def _row(stored: StoredRun) -> RunRow:
    run, recipe, quality = stored.run, stored.run.recipe, stored.run.quality
    return RunRow(
        number=stored.number,
        name=stored.name,
        keep=run.keep,
        keep_model=run.keep_model,
        parameters=run.parameters_after,
        bytes=run.bytes_after,
        objective=recipe.objective,
        allocate=recipe.allocate,
        form=recipe.form,
        bits=recipe.bits,
        refine=recipe.refine,
        predicted_divergence=run.predicted_divergence,
        divergence=None if quality is None else quality.factored.get("divergence"),
        perplexity=None if quality is None else quality.factored.get("perplexity"),
        perplexity_ratio=None if quality is None else quality.ratio,
        scores={} if quality is None else {name: after for name, (_, after) in quality.scores.items()},
        measured_on=None if quality is None else _told(quality),
        seconds=run.seconds.get("total"),
        moments_reused=run.moments_reused,
        peak_memory=run.peak_memory or None,
    )


def _told(quality: Measured) -> str:
    return f"{without_paths(quality.text)}, {quality.words}"


def _same_data(one: Measured, other: Measured) -> bool:
    """Say whether two runs were measured on the same data: it is called the same, and the original scores the same on it."""
    if (_told(one), one.original.get("tokens")) != (_told(other), other.original.get("tokens")):
        return False
    known = one.original.get("loss") is not None
    return all(_close(_of_original(one, name), _of_original(other, name)) for name in (("loss",) if known else SCORES))


def _of_original(quality: Measured, name: str) -> float | None:
    return quality.scores[name][0] if name in quality.scores else quality.original.get(name)


def _close(one: float | None, other: float | None) -> bool:
    return one is other or (one is not None and other is not None and math.isclose(one, other, rel_tol=SAME))


def _panels(runs: Sequence[StoredRun]) -> list[Panel]:
    """Return one panel for each data that several runs were measured on, and one of predictions where these lack a run.

    A run by itself is set against no other.
    """
    apart: list[list[tuple[StoredRun, Measured]]] = []
    for stored in runs:
        if (quality := stored.run.quality) is not None:
            same = next((cluster for cluster in apart if _same_data(cluster[0][1], quality)), None)
            if same is None:
                apart.append(same := [])
            same.append((stored, quality))
    panels = [_measured_panel(cluster) for cluster in apart]
    panels = [panel for panel in panels if len(panel.points) > 1]
    if any(all(stored.number not in panel.points for panel in panels) for stored in runs):
        predicted = _panel("predicted", "", ((stored, stored.run.predicted_divergence) for stored in runs))
        panels += [predicted] if len(predicted.points) > 1 else []
    return panels


def _measured_panel(cluster: Sequence[tuple[StoredRun, Measured]]) -> Panel:
    """Return size against divergence, or against perplexity where a divergence is missing."""
    known = all(quality.factored.get("divergence") is not None for _, quality in cluster)
    measure: Literal["divergence", "perplexity"] = "divergence" if known else "perplexity"
    return _panel(
        measure, _told(cluster[0][1]), ((stored, quality.factored.get(measure)) for stored, quality in cluster)
    )


def _panel(
    measure: Literal["divergence", "perplexity", "predicted"], on: str, values: Iterable[tuple[StoredRun, float | None]]
) -> Panel:
    points = {
        stored.number: (stored.run.bytes_after, float(value))
        for stored, value in values
        if value is not None and math.isfinite(value)
    }
    return Panel(measure=measure, on=on, points=points, front=front_of(points))


def front_of(points: dict[int, tuple[int, float]]) -> list[int]:
    """Return the keys of the points that no other is at least as good as in both coordinates and better in one."""

    def beaten(own: tuple[int, float]) -> bool:
        return any(x <= own[0] and y <= own[1] and (x, y) != own for x, y in points.values())

    return sorted((key for key, own in points.items() if not beaten(own)), key=lambda key: (points[key], key))
