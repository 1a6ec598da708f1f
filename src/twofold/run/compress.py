"""The main job: factorize a model, measure it, and write the checkpoint with its plan, recipe, card and report."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from twofold.checkpoint.plugin import attach
from twofold.evaluation.streamed import LastStates
from twofold.factor.apply import factor_entries
from twofold.factor.prepared import Prepared, carry_out
from twofold.factor.stream import finish, write_units
from twofold.factor.verify import verify_bytes
from twofold.host import processes
from twofold.host.clock import Stopwatch, machine, peak_memory
from twofold.host.folders import check_apart, check_output, check_space, staged_folder
from twofold.host.progress import progress
from twofold.host.quiet import quiet_bars
from twofold.host.unfinished import Work, working
from twofold.model.load import LoadedModel, load_streamed
from twofold.model.streamed import Streamed
from twofold.nn.compact import CompactLinear
from twofold.nn.places import BASES, cast_weights, dense_again
from twofold.planning.plan import Plan, PlanEntry
from twofold.recipe import Recipe
from twofold.refine import Refined
from twofold.refine.steps.series import refine
from twofold.report.record import Measured, Run, Sample
from twofold.run.open import open_for
from twofold.run.prepare import prepare
from twofold.run.sizing import Sizing
from twofold.task.quality import Logits, measure_quality
from twofold.task.text.held_out import evaluation_text, gives_logits
from twofold.task.text.windows import fit_window

SAMPLE_TOKENS = 32
QUESTION = "What is the capital of France, and why is it famous?"
BEGINNINGS = ("The history of the city begins", "In the morning, the children")


def compress(
    recipe: Recipe,
    out: Path | str,
    *,
    overwrite: bool = False,
    moments_file: Path | None = None,
    quiet: bool = False,
) -> Run | None:
    """Factorize a model and write the checkpoint with its plan, recipe, card and report.

    A run that was stopped goes on from what it had done, if it is started again with the same settings and output.

    Returns:
        The record of the run; None in all processes but the first, if many work together.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
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
    check_apart(out, loaded.source, _files_read(recipe, moments_file))
    measured_on = evaluation_text(loaded, recipe)
    with working(out, recipe.model) as work:
        sizing = Sizing(loaded, recipe, measured_on, work=work, quiet=quiet) if recipe.goal is not None else None
        prepared = prepare(recipe, opened, watch, moments_folder=moments_file, work=work, sizing=sizing, quiet=quiet)
        if sizing is not None:
            with watch.stage("search"):
                processes.same(partial(sizing.find, prepared))
        check_space(out, int(prepared.plan.bytes_after * 1.05) + 20_000_000)
        work.update(stage="factorizing")
        factored = _Streaming(prepared, recipe, work) if loaded.residence.streamed else _Resident(prepared, recipe)
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
    factored: _Resident | _Streaming,
    recipe: Recipe,
    measured_on: Tensor | None,
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
        samples = factored.samples()
    windows = prepared.windows
    run = Run(
        recipe=recipe,
        machine=machine(loaded.residence.device, loaded.residence.dtype),
        calibration=windows.source if windows else "none: this objective uses the weights alone",
        calibration_tokens=windows.tokens if windows else 0,
        calibration_sha256=windows.sha256 if windows else "",
        fingerprint=prepared.moments.fingerprint if prepared.moments else "",
        moments_reused=prepared.reused,
        predicted_divergence=prepared.plan.predicted_divergence,
        probes=sizing.probes if sizing is not None else [],
        refinement=refined,
        quality=measured,
        samples=samples,
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
    work.update(stage="writing")
    with staged_folder(out, overwrite) as folder:
        with watch.stage("write"):
            factored.write(folder)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(folder)
            _verify(folder, prepared.plan, loaded.model)
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


class _Resident:
    """A model that is in memory, and the dense layers that were replaced in it."""

    def __init__(self, prepared: Prepared, recipe: Recipe) -> None:
        self.prepared, self.recipe = prepared, recipe
        self.replaced: dict[str, nn.Module] = {}

    def factorize(self, *, quiet: bool) -> None:
        if processes.is_main():
            self.replaced = carry_out(self.prepared, quiet=quiet)

    def refine(self, folder: Path, *, quiet: bool) -> list[Refined]:
        return refine(self.prepared, self.replaced, self.recipe, folder=folder, quiet=quiet)

    def models(self, windows: Tensor, *, quiet: bool) -> list[Logits]:
        """The original and the factored model as functions from token ids to logits."""
        model = self.prepared.loaded.model

        def dense(ids: Tensor) -> Tensor:
            with dense_again(model, self.replaced):
                return model(input_ids=ids.to(model.device)).logits  # type: ignore[no-any-return]

        def factored(ids: Tensor) -> Tensor:
            return model(input_ids=ids.to(model.device)).logits  # type: ignore[no-any-return]

        return [dense, factored]

    def has_logits(self, windows: Tensor) -> bool:
        """Whether the model gives logits over the vocabulary."""
        return gives_logits(self.prepared.loaded.model, windows)

    def samples(self) -> list[Sample]:
        return _samples(self.prepared.loaded, self.replaced)

    def write(self, folder: Path) -> None:
        self.replaced.clear()
        model = self.prepared.loaded.model
        cast_weights(model, self.prepared.loaded.stored_dtype)
        attach(model)
        with quiet_bars():
            model.save_pretrained(folder)


class _Streaming:
    """A model whose weights are on disk, and the parts of the factored checkpoint that are written block by block."""

    def __init__(self, prepared: Prepared, recipe: Recipe, work: Work) -> None:
        self.prepared, self.recipe, self.work = prepared, recipe, work
        assert isinstance(prepared.loaded.residence, Streamed)
        self.residence: Streamed = prepared.loaded.residence

    def factorize(self, *, quiet: bool) -> None:
        prepared, loaded = self.prepared, self.prepared.loaded
        with progress("Factorizing", len(prepared.plan.entries), unit="weights", quiet=quiet) as tick:

            def factor(entries: list[PlanEntry]) -> Iterator[tuple[PlanEntry, CompactLinear | None, str | None]]:
                return factor_entries(loaded.model, entries, prepared.made, loaded.stored_dtype, tick)

            prepared.plan, units = write_units(self.work.checkpoint, self.residence, prepared.plan, factor, tick)
        self.work.update(units=units)

    def refine(self, folder: Path, *, quiet: bool) -> list[Refined]:
        return []  # refused before any work

    def has_logits(self, windows: Tensor) -> bool:
        config = self.prepared.loaded.model.config.get_text_config()
        return self.residence.has_head and int(windows.max()) < getattr(config, "vocab_size", 0)

    def models(self, windows: Tensor, *, quiet: bool) -> list[Logits]:
        """The original and the factored model; each is worked through once, and its last hidden states are kept."""
        folder = self.work.folder / "factored"
        folder.mkdir(exist_ok=True)
        finish(folder, self.work.checkpoint, self.residence, self.prepared.loaded.stored_dtype)
        smaller = load_streamed(
            str(folder),
            self.residence.chain,
            dtype=self.recipe.dtype,
            device=self.recipe.device,
            trust_remote_code=self.recipe.trust_remote_code,
        ).residence
        assert isinstance(smaller, Streamed)
        return [LastStates(one, windows, quiet=quiet).logits for one in (self.residence, smaller)]

    def samples(self) -> list[Sample]:
        self.prepared.plan.notes.append(
            "no sample answers: the model was worked through block by block, and writing text that way takes too long"
        )
        return []

    def write(self, folder: Path) -> None:
        finish(folder, self.work.checkpoint, self.residence, self.prepared.loaded.stored_dtype)


def _files_read(recipe: Recipe, moments_file: Path | None) -> list[Path]:
    """The files that a run reads beside the model's folder."""
    texts = [one for one in recipe.calibration if one != "self"]
    names = [recipe.model, *texts, recipe.eval_text or "", str(moments_file or "")]
    return [Path(one) for name in names if name for one in glob.glob(name) or [name] if Path(one).exists()]  # noqa: PTH207


def _measure(
    prepared: Prepared,
    recipe: Recipe,
    factored: _Resident | _Streaming,
    windows: Tensor | None,
    sizing: Sizing | None,
    *,
    quiet: bool,
) -> Measured | None:
    """The quality of both models on the evaluation text, or on the held-out part of the calibration.

    Where the size was searched for, the original was measured then and is not again.

    A model without token logits is not measured, and one that predicts no next token is measured with a note.
    """
    if recipe.eval_windows == 0:
        return None
    source = Path(recipe.eval_text or "").name
    if windows is None and prepared.windows is not None and len(prepared.windows.held_out):
        source = f"held-out {prepared.windows.source}"
        windows = prepared.windows.held_out[: recipe.eval_windows]
    if windows is None:
        return None
    if not factored.has_logits(windows):
        prepared.plan.notes.append("no quality was measured: this model gives no logits over its vocabulary")
        return None
    if not prepared.loaded.model.can_generate():
        prepared.plan.notes.append(
            "this model does not predict the next token, so its perplexity says little; its divergence is what counts"
        )
    models = factored.models(windows, quiet=quiet)
    if sizing is not None:
        original, smaller = sizing.dense, sizing.reference.measure(models[1], models[0], quiet=quiet)
    else:
        original, smaller = measure_quality(models, windows, quiet=quiet)
    return Measured.of(source, (windows.shape[0], windows.shape[1]), original, smaller)


def _samples(loaded: LoadedModel, replaced: dict[str, nn.Module]) -> list[Sample]:
    """Greedy answers of both models to two prompts; none if the model does not generate."""
    model, tokenizer = loaded.model, loaded.tokenizer
    generates = getattr(model, "can_generate", lambda: False)() and not getattr(
        model.config, "is_encoder_decoder", False
    )
    if tokenizer is None or not generates:
        return []
    prompts = [(text, text) for text in BEGINNINGS]
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": QUESTION}]
        with suppress(Exception):  # a template is data, and may refuse anything
            prompts[0] = (QUESTION, tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    samples = []
    for prompt, text in prompts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
        answers = []
        for context in (dense_again(model, replaced), nullcontext()):
            with context, torch.no_grad(), quiet_bars():
                made = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS, do_sample=False
                )
            answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        samples.append(Sample(prompt=prompt, original=answers[0], factored=answers[1]))
    return samples


def _verify(folder: Path, plan: Plan, model: nn.Module) -> None:
    """Count what was really stored, so that no figure of the plan goes unchecked: numbers, or bytes where some are integers."""
    stored = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                numbers = 1
                for size in file.get_slice(name).get_shape():
                    numbers *= size
                stored += numbers
    if plan.integers:
        verify_bytes(folder, plan, model)
        return
    ours = sum(1 for entry in plan.entries if entry.rank is not None) + plan.order_numbers
    factored = tuple(f"{entry.name}." for entry in plan.entries if entry.rank is not None)
    bases = {f"{BASES}.{entry.basis}." for entry in plan.entries if entry.basis is not None}
    persistent = model.state_dict().keys()
    buffers = {
        id(b): b.numel()
        for n, b in model.named_buffers()
        if n in persistent and not (factored and n.startswith(factored)) and not any(basis in n for basis in bases)
    }
    foreign = sum(buffers.values())
    if stored != plan.model_after + ours + foreign:
        raise RuntimeError(
            f"the checkpoint holds {stored} numbers, the plan says {plan.model_after + ours + foreign}; please report this"
        )
