"""The main job: factorize a model, measure it, and write the checkpoint with its plan, recipe, card and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from twofold.evidence.beside import Beside, measure_beside
from twofold.factor.verify import verify
from twofold.host import processes
from twofold.host.clock import Stopwatch, machine, peak_memory
from twofold.host.faults import decorating
from twofold.host.folders import check_apart, check_output, check_space, staged_folder
from twofold.host.unfinished import working
from twofold.model.written import Companions
from twofold.recipe import Recipe, make_recipe
from twofold.refine import Refined
from twofold.report.explain import explain as explained
from twofold.report.messages import Words
from twofold.report.record import Measured, Run, Sample
from twofold.run.open import open_for
from twofold.run.prepare import prepare
from twofold.run.sizing import Sizing, finite, gives_nothing, samples_to_measure
from twofold.run.ways import InMemory, OnDisk
from twofold.settings.base import from_call
from twofold.task import Samples
from twofold.task.output.quality import measure_quality
from twofold.task.text.sources import data_files


def compress(
    recipe: Recipe | Mapping[str, Any] | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    moments: Path | str | None = None,
    explain: bool = False,
    lang: str = "en",
    quiet: bool = False,
    **settings: Any,
) -> Run | None:
    """Factorize a model and write the checkpoint with its plan, recipe, card and report.

    A run that was stopped goes on from what it had done, if it is started again with the same settings and output.

    >>> run = twofold.compress("smollm2", "small", keep=0.8)    # doctest: +SKIP

    Args:
        recipe: a recipe, its settings, or the name of the model.
        moments: the folder of the moments; by default one in the cache.
        explain: whether the plan and the record say in words why some weights keep more than others, what a megabyte more would
            buy, and whether integers would serve better.
        lang: the language of the report and of the explanation, ``en`` or ``es``.
        settings: any fields of ``twofold.Recipe``, where the model is named.

    Returns:
        The record of the run; None in all processes but the first, if many work together.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
    recipe = from_call(Recipe, make_recipe, recipe, settings)
    moments = None if moments is None else Path(moments).expanduser()
    words = Words(lang)
    processes.join()
    quiet = quiet or not processes.is_main()
    out = Path(out).expanduser().resolve()
    watch = Stopwatch()
    if processes.is_main():
        check_output(out, overwrite)
    with watch.stage("load"):
        opened = open_for(recipe, quiet=quiet)
    loaded = opened.loaded
    recipe = opened.fitted(recipe, quiet=quiet)
    check_apart(out, [loaded.source], _files_read(recipe, moments))
    companions = Companions.of(loaded)
    sizing = Sizing(opened, recipe, quiet=quiet) if recipe.goal is not None else None
    evaluation = sizing.evaluation if sizing is not None else None
    if sizing is None and opened.task is not None:
        evaluation = opened.task.measured(loaded, recipe)
    with working(out, recipe.model) as work:
        prepared = prepare(recipe, opened, watch, moments_folder=moments, work=work, sizing=sizing, quiet=quiet)
        check_space(out, int(prepared.plan.bytes_after * 1.05) + 20_000_000)
        beside = Beside()
        with watch.stage("report"), decorating("spectra of other metrics", prepared.plan.notes):
            beside = measure_beside(loaded.residence, prepared.targets, prepared.decomposition, recipe)
        with decorating("explanation", prepared.plan.notes):
            if explain:
                said = explained(recipe, prepared.request(recipe), prepared.plan, beside.rounded, words)
                prepared.plan.explanation = said
        work.update(stage="factorizing")
        way = (OnDisk if loaded.residence.streamed else InMemory)(prepared, recipe, work, companions, quiet)
        with watch.stage("factorize"):
            way.factorize()
        if not processes.is_main():
            processes.wait()
            return None
        run = _finish(out, way, evaluation, sizing, watch, beside, words, overwrite=overwrite)
    processes.wait()
    return run


def _files_read(recipe: Recipe, moments: Path | None) -> list[Path]:
    """List the files that a run reads beside the model's folder."""
    texts = [text for text in recipe.calibration if text != "self"]
    names = [recipe.model, *texts, recipe.eval_text or "", str(moments or "")]
    return [path for name in names if name for path in data_files(name)]


def _finish(
    out: Path,
    way: InMemory | OnDisk,
    evaluation: Samples | None,
    sizing: Sizing | None,
    watch: Stopwatch,
    beside: Beside,
    words: Words,
    *,
    overwrite: bool,
) -> Run:
    """Measure the factored model, and write it with its plan, recipe, card and report."""
    prepared, recipe, work, loaded = way.prepared, way.recipe, way.work, way.prepared.loaded
    refined: list[Refined] = []
    if recipe.refine:
        work.update(stage="refining")
        with watch.stage("refine"):
            refined = way.refine()
    work.update(stage="measuring")
    with watch.stage("measure"):
        measured = _measure(way, evaluation, sizing)
    prepared.plan.notes += way.companions.notes
    answers: list[Sample] = []
    with watch.stage("samples"), decorating("sample answers", prepared.plan.notes):
        answers = way.answers()
    plan, values = prepared.plan, prepared.spectra.values
    run = _record(way, refinement=refined, quality=measured, samples=answers)
    read = prepared.data.samples if prepared.data is not None else evaluation
    run.windows_begin = read.begin if read is not None else ""
    run.probes = sizing.probes if sizing is not None else []
    work.update(stage="writing")
    with staged_folder(out, overwrite) as folder:
        with watch.stage("write"):
            way.write(folder)
            verify(folder, plan, loaded.model)
            plan.save(folder / "plan.json")
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            tensors = {name: torch.from_numpy(values[name].astype("float32")) for name in values}
            save_file(tensors, folder / "spectra.safetensors")
        run.seconds, run.peak_memory = {**watch.seconds}, peak_memory()
        with watch.stage("report"), decorating("report", run.notes):
            from twofold.report.explorer import explorer_data
            from twofold.report.page import write_report

            live = explorer_data(prepared.request(recipe), plan, recipe, beside)
            write_report(folder, run, plan, values, live, words)
        run.seconds, run.peak_memory = {**watch.seconds, "total": watch.total()}, peak_memory()
        with decorating("card", run.notes):
            from twofold.report.card import write_card

            write_card(folder, run, plan)
        (folder / "run.json").write_text(run.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return run


def _record(
    way: InMemory | OnDisk, *, refinement: list[Refined], quality: Measured | None, samples: list[Sample]
) -> Run:
    """Return the record of a run, without its probes and times."""
    prepared, recipe = way.prepared, way.recipe
    data, plan, residence = prepared.data, prepared.plan, prepared.loaded.residence
    sizes = ("keep", "keep_model", "target_before", "target_after", "bytes_before", "bytes_after")
    return Run(
        recipe=recipe,
        machine=machine(residence.device, residence.dtype),
        calibration=data.samples.source if data else "none: this objective uses the weights alone",
        calibration_tokens=data.units if data else 0,
        task=prepared.opened.task.name if prepared.opened.task else "",
        unit=data.samples.unit if data else "tokens",
        calibration_sha256=data.samples.sha256 if data else "",
        fingerprint=prepared.moments.fingerprint if prepared.moments else "",
        moments_reused=prepared.reused,
        predicted_divergence=plan.predicted_divergence,
        refinement=refinement,
        quality=quality,
        samples=samples,
        notes=[*plan.notes, *(refined.words for refined in refinement)],
        explanation=plan.explanation,
        parameters_before=plan.model_before,
        parameters_after=plan.model_after,
        **way.companions.record,
        **{name: getattr(plan, name) for name in sizes},
    )


def _measure(way: InMemory | OnDisk, evaluation: Samples | None, sizing: Sizing | None) -> Measured | None:
    """Measure both models on the evaluation text, or on the held-out part of the calibration.

    If the size was searched for, the original was measured then and is not again. A model that gives no outputs of its task is
    not measured, and one that predicts no next token is measured with a note.
    """
    prepared, recipe, task = way.prepared, way.recipe, way.prepared.opened.task
    samples, source = samples_to_measure(evaluation, prepared.data, recipe)
    if samples is None or recipe.eval_windows == 0:
        return None
    if task is None or not way.predicts(samples, task):
        prepared.plan.notes.append(f"no quality was measured: {gives_nothing(task)}")
        return None
    if task.fallback and not prepared.loaded.model.can_generate():
        prepared.plan.notes.append(
            "this model does not predict the next token, so its perplexity says little; its divergence is what counts"
        )
    dense, factored = way.models(samples, task)
    if sizing is not None:
        qualities = [sizing.dense, sizing.reference.measure(factored, dense, quiet=way.quiet)]
    else:
        qualities = measure_quality([dense, factored], samples, task, quiet=way.quiet)
    measured = Measured.of(source, samples, task, *qualities)
    with decorating(f"measures of {task.name}", prepared.plan.notes):
        before, after = way.scores(samples, task)
        measured.scores = {name: (finite(before.get(name)), finite(score)) for name, score in after.items()}
    return measured
