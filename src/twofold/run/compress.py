"""The main job: factorize a model, measure it, and write the checkpoint with its plan, recipe, card and report."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from twofold.factor.prepared import Prepared
from twofold.factor.verify import verify
from twofold.host import processes
from twofold.host.clock import Stopwatch, machine, peak_memory
from twofold.host.folders import check_apart, check_output, check_space, staged_folder
from twofold.host.unfinished import Work, working
from twofold.recipe import Recipe, make_recipe
from twofold.refine import Refined
from twofold.report.record import Measured, Run, Sample
from twofold.run.open import open_for
from twofold.run.prepare import prepare
from twofold.run.sizing import Sizing
from twofold.run.ways import InMemory, OnDisk
from twofold.settings.base import given
from twofold.task import Samples
from twofold.task.output.quality import measure_quality
from twofold.task.text.windows import fit_window


def compress(
    recipe: Recipe | Mapping[str, Any] | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    moments: Path | str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Run | None:
    """Factorize a model and write the checkpoint with its plan, recipe, card and report.

    A run that was stopped goes on from what it had done, if it is started again with the same settings and output.

    >>> run = twofold.compress("smollm2", "small", keep=0.8)    # doctest: +SKIP

    Args:
        recipe: a recipe, its settings, or the name of the model.
        moments: the folder of the moments; by default one in the cache.
        settings: any fields of ``twofold.Recipe``, where the model is named.

    Returns:
        The record of the run; None in all processes but the first, if many work together.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
    recipe = given(Recipe, make_recipe, recipe, settings)
    moments = None if moments is None else Path(moments)
    processes.join()
    quiet = quiet or not processes.is_main()
    out = Path(out).expanduser().resolve()
    watch = Stopwatch()
    if processes.is_main():
        check_output(out, overwrite)
    with watch.stage("load"):
        opened = open_for(recipe, quiet=quiet)
    loaded = opened.loaded
    recipe = fit_window(recipe, loaded, quiet=quiet)
    check_apart(out, loaded.source, _files_read(recipe, moments))
    measured_on = opened.task.measured(loaded, recipe) if opened.task is not None else None
    with working(out, recipe.model) as work:
        sizing = Sizing(opened, recipe, measured_on, work=work, quiet=quiet) if recipe.goal is not None else None
        prepared = prepare(recipe, opened, watch, moments_folder=moments, work=work, sizing=sizing, quiet=quiet)
        if sizing is not None:
            with watch.stage("search"):
                processes.same(partial(sizing.find, prepared))
        check_space(out, int(prepared.plan.bytes_after * 1.05) + 20_000_000)
        work.update(stage="factorizing")
        factored = OnDisk(prepared, recipe, work) if loaded.residence.streamed else InMemory(prepared, recipe)
        with watch.stage("factorize"):
            factored.factorize(quiet=quiet)
        if not processes.is_main():
            processes.wait()
            return None
        run = _finish(
            out, prepared, factored, recipe, measured_on, sizing, watch, work, overwrite=overwrite, quiet=quiet
        )
    processes.wait()
    return run


def _finish(
    out: Path,
    prepared: Prepared,
    factored: InMemory | OnDisk,
    recipe: Recipe,
    measured_on: Samples | None,
    sizing: Sizing | None,
    watch: Stopwatch,
    work: Work,
    *,
    overwrite: bool,
    quiet: bool,
) -> Run:
    """Measure the factored model, and write it with its plan, recipe, card and report."""
    from twofold.report.card import write_card
    from twofold.report.page import write_report

    loaded = prepared.loaded
    refined: list[Refined] = []
    if recipe.refine:
        work.update(stage="refining")
        with watch.stage("refine"):
            refined = factored.refine(work.folder / "refine", quiet=quiet)
    work.update(stage="measuring")
    with watch.stage("measure"):
        measured = _measure(prepared, recipe, factored, measured_on, sizing, quiet=quiet)
    if loaded.tokenizer is None:
        prepared.plan.notes.append(f"no tokenizer was written: {loaded.no_tokenizer or 'the model has none'}")
    with watch.stage("samples"):
        answers = factored.answers()
    run = _record(prepared, recipe, refined, measured, answers, sizing)
    work.update(stage="writing")
    with staged_folder(out, overwrite) as folder:
        with watch.stage("write"):
            factored.write(folder)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(folder)
            verify(folder, prepared.plan, loaded.model)
            prepared.plan.save(folder / "plan.json")
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            values = prepared.spectra.values
            save_file(
                {name: torch.from_numpy(values[name].astype("float32")) for name in values},
                folder / "spectra.safetensors",
            )
        run = run.model_copy(update={"seconds": {**watch.seconds}, "peak_memory": peak_memory()})
        with watch.stage("report"):
            write_report(folder, run, prepared.plan, prepared.spectra.values)
        run = run.model_copy(
            update={"seconds": {**watch.seconds, "total": watch.total()}, "peak_memory": peak_memory()}
        )
        write_card(folder, run, prepared.plan)
        (folder / "run.json").write_text(run.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return run


def _record(
    prepared: Prepared,
    recipe: Recipe,
    refined: list[Refined],
    measured: Measured | None,
    answers: list[Sample],
    sizing: Sizing | None,
) -> Run:
    """Return the record of a run, but for the times."""
    data = prepared.data
    return Run(
        recipe=recipe,
        machine=machine(prepared.loaded.residence.device, prepared.loaded.residence.dtype),
        calibration=data.samples.source if data else "none: this objective uses the weights alone",
        calibration_tokens=data.units if data else 0,
        calibration_sha256=data.samples.sha256 if data else "",
        fingerprint=prepared.moments.fingerprint if prepared.moments else "",
        moments_reused=prepared.reused,
        predicted_divergence=prepared.plan.predicted_divergence,
        probes=sizing.probes if sizing is not None else [],
        refinement=refined,
        quality=measured,
        samples=answers,
        notes=[*prepared.plan.notes, *(one.words for one in refined)],
        keep=prepared.plan.keep,
        keep_model=prepared.plan.keep_model,
        parameters_before=prepared.plan.model_before,
        parameters_after=prepared.plan.model_after,
        target_before=prepared.plan.target_before,
        target_after=prepared.plan.target_after,
        bytes_before=prepared.plan.bytes_before,
        bytes_after=prepared.plan.bytes_after,
    )


def _files_read(recipe: Recipe, moments: Path | None) -> list[Path]:
    """The files that a run reads beside the model's folder."""
    texts = [one for one in recipe.calibration if one != "self"]
    names = [recipe.model, *texts, recipe.eval_text or "", str(moments or "")]
    return [Path(one) for name in names if name for one in glob.glob(name) or [name] if Path(one).exists()]  # noqa: PTH207


def _measure(
    prepared: Prepared,
    recipe: Recipe,
    factored: InMemory | OnDisk,
    measured_on: Samples | None,
    sizing: Sizing | None,
    *,
    quiet: bool,
) -> Measured | None:
    """Measure both models on the evaluation text, or on the held-out part of the calibration.

    Where the size was searched for, the original was measured then and is not again. A model that gives no outputs of its task is
    not measured, and one that predicts no next token is measured with a note.
    """
    samples, source, task = measured_on, Path(recipe.eval_text or "").name, prepared.opened.task
    if samples is None and prepared.data is not None and len(prepared.data.held_out):
        source = f"held-out {prepared.data.samples.source}"
        samples = prepared.data.held_out[: recipe.eval_windows]
    if samples is None or recipe.eval_windows == 0:
        return None
    if task is None or not factored.predicts(samples, task):
        prepared.plan.notes.append("no quality was measured: this model gives no logits over its vocabulary")
        return None
    if not prepared.loaded.model.can_generate():
        prepared.plan.notes.append(
            "this model does not predict the next token, so its perplexity says little; its divergence is what counts"
        )
    models = factored.models(samples, task, quiet=quiet)
    if sizing is not None:
        original, smaller = sizing.dense, sizing.reference.measure(models[1], models[0], quiet=quiet)
    else:
        original, smaller = measure_quality(models, samples, task, quiet=quiet)
    return Measured.of(source, (samples.shape[0], samples.shape[1]), original, smaller)
