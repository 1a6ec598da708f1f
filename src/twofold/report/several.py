"""Pages of runs that are done: the report of one again, or several runs side by side on one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from twofold.errors import TwofoldError
from twofold.host.files import write_text
from twofold.report.explorer import stored_data
from twofold.report.formats import NONE
from twofold.report.messages import Words
from twofold.report.names import public_recipe
from twofold.report.page import GENERATOR, check_page, write_page
from twofold.report.runs import HIGHER, LOWER, RunGroup, RunRow, RunsReport, StoredRun, group_of, grouped, read_runs
from twofold.report.templates import inlined, render

RUNS_GENERATOR = '<meta name="generator" content="Twofold runs">'
PAGE = "runs.html"
UNTOLD = {"model", "revision", "trust_remote_code"}  # fields that are not compared: they are the same in a group


def report_runs(
    folders: Sequence[Path | str] | Path | str,
    *,
    out: Path | str | None = None,
    lang: str = "en",
    overwrite: bool = False,
) -> RunsReport:
    """Write one page that sets runs side by side; of a single run, write its own report again.

    >>> twofold.report_runs(["small-0.8", "small-0.6"], out="sizes.html")    # doctest: +SKIP

    Args:
        folders: outputs of ``twofold.compress``.
        out: the page to write; by default runs.html in the current folder, or report.html in the folder of a single run.
        lang: the language of the page, ``en`` or ``es``.
        overwrite: replace a file that is no such page.

    Returns:
        What the page says, in numbers.

    Raises:
        TwofoldError: if a folder is no run, or the page can't be written.
    """
    words = Words(lang)
    runs = read_runs([folders] if isinstance(folders, str | Path) else list(folders))
    if not runs:
        raise TwofoldError("name the folders of one run or more, each the `out` of twofold compress")
    alone = runs[0] if len(runs) == 1 else None
    page = Path(out).expanduser() if out is not None else Path(PAGE) if alone is None else alone.folder / "report.html"
    if page.is_dir() or not overwrite:
        check_page(page, RUNS_GENERATOR if alone is None else GENERATOR)
    result = RunsReport(page=str(page), groups=[group_of(group) for group in grouped(runs)])
    if alone is None:
        write_text(page, runs_text(runs, result, words))
    else:
        _write_again(page, alone, words)
    return result


def _write_again(page: Path, stored: StoredRun, words: Words) -> None:
    """Write the report of a run from what its folder holds; what it plans anew from is that of the page that stands there."""
    path = stored.folder / "spectra.safetensors"
    try:
        spectra = load_file(path) if path.is_file() else {}
    except (SafetensorError, OSError) as error:
        raise TwofoldError(f"{path} can't be read ({error}); run the compression again, or delete it") from error
    live = stored_data(stored.folder / "report.html")
    write_page(page, stored.run.recipe, stored.plan, spectra, live, stored.run, words=words)


def runs_text(runs: Sequence[StoredRun], result: RunsReport, words: Words) -> str:
    """Make the page of several runs. All that comes from a model, from data or from names of folders is escaped."""
    parts = [_part(group, members, words) for group, members in zip(result.groups, grouped(runs), strict=True)]
    models = ", ".join(dict.fromkeys(group.model for group in result.groups))
    return render(
        "several.html.jinja",
        style=inlined("report.css"),
        script=None,
        server=None,
        say=words.say,
        language=words.language,
        title=words.say("runs.title", model=models),
        parts=parts,
        runs=len(runs),
    )


def _part(group: RunGroup, runs: Sequence[StoredRun], words: Words) -> dict[str, Any]:
    """Return what the template shows of the runs of one original."""
    from twofold.report.front import runs_front  # imports matplotlib

    unit = words.nats(group.prediction)
    return {
        "title": f"{group.model}, {group.task}" if group.task else group.model,
        "figures": [(runs_front(panel, unit, words), _caption(group, panel, words)) for panel in group.panels],
        "columns": [column for column, *_ in _columns(group, words)],
        "rows": _table(group, words),
        "remarks": _remarks(group, words),
        "differences": _differences(runs, words),
        "names": [f"{stored.number} · {stored.name}" for stored in runs],
        "samples": _samples(runs, words),
        "unsampled": ", ".join(str(stored.number) for stored in runs if not stored.run.samples),
    }


def _caption(group: RunGroup, panel: Any, words: Words) -> str:
    said = words.say(f"runs.caption.{panel.measure}", data=panel.on)
    missing = [str(row.number) for row in group.rows if row.number not in panel.points]
    return said + (" " + words.say("runs.missing", runs=", ".join(missing)) if missing else "")


Column = tuple[str, Callable[[RunRow], Any], Callable[[Any], str], bool | None]


def _columns(group: RunGroup, words: Words) -> list[Column]:
    """Return for each column what it is called, its value of a row, how that is written, and whether less is better.

    None where no value is better than another, or where they may not be compared.
    """
    of = group.same_data
    columns: list[Column] = [
        (words.say("runs.keep"), lambda row: row.keep, words.percent, None),
        (words.say("runs.keep.model"), lambda row: row.keep_model, words.percent, None),
        (words.say("runs.parameters"), lambda row: row.parameters, words.millions, True),
        (words.say("runs.bytes"), lambda row: row.bytes, words.megabytes, True),
        (words.say("runs.objective"), lambda row: row.objective, str, None),
        (words.say("runs.allocate"), lambda row: row.allocate, str, None),
        (words.say("runs.form"), lambda row: row.form, str, None),
        (words.say("runs.bits"), lambda row: row.bits, str, None),
        (words.say("runs.refine"), lambda row: ", ".join(row.refine) or None, str, None),
        (
            words.say("runs.predicted"),
            lambda row: row.predicted_divergence,
            words.number,
            group.same_calibration or None,
        ),
        (words.say("runs.measured"), lambda row: row.divergence, words.number, of or None),
        (words.say("row.perplexity"), lambda row: row.perplexity, lambda value: words.number(value, 4), of or None),
        (words.say("runs.times"), lambda row: row.perplexity_ratio, words.number, of or None),
    ]
    for name in dict.fromkeys(name for row in group.rows for name in row.scores):
        less = True if name in LOWER else False if name in HIGHER else None
        shown = words.told(name.replace("_", " "))
        columns.append((shown, _score(name), lambda value: words.number(value, 4), less if of else None))
    time = group.same_machine and not any(row.moments_reused for row in group.rows)
    columns += [
        (words.say("column.time"), lambda row: row.seconds, words.duration, time or None),
        (words.say("fact.memory"), lambda row: row.peak_memory, words.megabytes, group.same_machine or None),
    ]
    return [column for column in columns if any(column[1](row) is not None for row in group.rows)]


def _score(name: str) -> Callable[[RunRow], Any]:
    return lambda row: row.scores.get(name)


def _table(group: RunGroup, words: Words) -> list[dict[str, Any]]:
    """Return the rows of the table: the name of a run, and of each column the value and whether it is the best."""
    panel = (
        group.panels[0] if len(group.panels) == 1 else None
    )  # with several, a run may be on one front and behind another
    best = {}
    for place, (_, value, _, less) in enumerate(_columns(group, words)):
        known = [value(row) for row in group.rows if value(row) is not None]
        if less is not None and len(set(known)) > 1:
            best[place] = min(known) if less else max(known)
    return [
        {
            "name": f"{row.number} · {row.name}",
            "mark": ""
            if panel is None
            else "● "
            if row.number in panel.front
            else "○ "
            if row.number in panel.points
            else "",
            "cells": [
                (NONE if value(row) is None else show(value(row)), place in best and value(row) == best[place])
                for place, (_, value, show, _) in enumerate(_columns(group, words))
            ],
        }
        for row in group.rows
    ]


def _remarks(group: RunGroup, words: Words) -> list[str]:
    """Say what the original is, and which figures may not be compared."""
    sizes = {"parameters": words.millions(group.parameters), "bytes": words.megabytes(group.bytes)}
    remarks = [words.say("runs.units", unit=words.nats(group.prediction)), words.say("runs.original", **sizes)]
    scores = [(words.say("row.perplexity"), group.perplexity)]
    scores += [(words.told(name.replace("_", " ")), score) for name, score in group.scores.items()]
    known = ", ".join(f"{name} {words.number(score, 4)}" for name, score in scores if score is not None)
    if known:
        remarks.append(words.say("runs.original.scores", scores=known))
    if not group.same_data:
        each = "; ".join(f"{row.number}: {row.measured_on}" for row in group.rows if row.measured_on)
        remarks.append(words.say("runs.other.data", each=each))
    unmeasured = [str(row.number) for row in group.rows if row.measured_on is None]
    if unmeasured:
        remarks.append(words.say("runs.unmeasured", runs=", ".join(unmeasured)))
    if not group.same_calibration and any(row.predicted_divergence is not None for row in group.rows):
        remarks.append(words.say("runs.other.calibration"))
    if not group.same_machine:
        remarks.append(words.say("runs.other.machine"))
    reused = [str(row.number) for row in group.rows if row.moments_reused]
    if reused:
        remarks.append(words.say("runs.reused", runs=", ".join(reused)))
    return remarks


def _differences(runs: Sequence[StoredRun], words: Words) -> list[tuple[str, list[str]]]:
    """Return the fields in which the recipes differ, each with its value in every run."""
    whole = [stored.run.recipe.model_dump(mode="json") for stored in runs]
    shown = [public_recipe(stored.run.recipe).model_dump(mode="json") for stored in runs]
    fields = [name for name in dict.fromkeys(name for recipe in whole for name in recipe) if name not in UNTOLD]
    differ = [name for name in fields if any(recipe.get(name) != whole[0].get(name) for recipe in whole)]
    return [(name, [_value(recipe.get(name)) for recipe in shown]) for name in differ]


def _value(value: Any) -> str:
    """Write the value of a setting as a recipe has it, on one line."""
    if value is None or value == [] or value == {}:
        return NONE
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return (
        str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6))
        .removesuffix("\n...\n")
        .strip()
    )


def _samples(runs: Sequence[StoredRun], words: Words) -> list[dict[str, Any]]:
    """Pair the answers of all runs to one prompt, behind that of the original; where the original's differ, each is shown."""
    prompts: dict[str, list[tuple[StoredRun, Any]]] = {}
    for stored in runs:
        for sample in stored.run.samples:
            prompts.setdefault(sample.prompt, []).append((stored, sample))
    paired = []
    for prompt, answers in prompts.items():
        originals: dict[str, list[str]] = {}
        for stored, sample in answers:
            originals.setdefault(sample.original, []).append(str(stored.number))
        named = [
            (words.say("original") if len(originals) == 1 else words.say("runs.original.of", runs=", ".join(of)), text)
            for text, of in originals.items()
        ]
        named += [(f"{stored.number} · {stored.name}", sample.factored) for stored, sample in answers]
        paired.append({"prompt": prompt, "answers": named})
    return paired
