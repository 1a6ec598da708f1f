"""The main job: factorize a model, measure it, and write the checkpoint with its plan, recipe, card and report."""

from __future__ import annotations

import glob
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from twofold.calibrate.windows import fit_window
from twofold.checkpoint import attach, staged_folder
from twofold.checkpoint.write import check_apart, check_output, check_space
from twofold.evaluate import evaluation_windows, measure_quality
from twofold.factorize import dense_again
from twofold.models import LoadedModel, cast_weights, need_tokenizer, positions, quiet_bars
from twofold.pipeline import Prepared, carry_out, load_for, prepare
from twofold.plan import Plan
from twofold.recipe import Recipe
from twofold.run import Measured, Run, Sample, Stopwatch, machine, peak_memory

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
) -> Run:
    """Factorize a model and write the checkpoint with its plan, recipe, card and report.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
    from twofold.report import write_card, write_report

    out = Path(out).expanduser().resolve()
    watch = Stopwatch()
    check_output(out, overwrite)
    with watch.stage("load"):
        loaded = load_for(recipe)
    recipe = fit_window(recipe, loaded, quiet=quiet)
    check_apart(out, loaded.source, _files_read(recipe, moments_file))
    measured_on = _evaluation_text(loaded, recipe)
    prepared = prepare(recipe, loaded, watch, moments_file=moments_file, quiet=quiet)
    check_space(out, int(prepared.plan.bytes_after * 1.05) + 20_000_000)
    model = loaded.model
    replaced = carry_out(prepared, recipe, watch, quiet=quiet)
    with watch.stage("measure"):
        measured = _measure(prepared, recipe, replaced, measured_on, quiet=quiet)
    if loaded.tokenizer is None:
        prepared.plan.notes.append(f"no tokenizer was written: {loaded.no_tokenizer or 'the model has none'}")
    with watch.stage("samples"):
        samples = _samples(loaded, replaced)
    replaced.clear()
    parameter = next(model.parameters())
    windows = prepared.windows
    run = Run(
        recipe=recipe,
        machine=machine(parameter.device, parameter.dtype),
        calibration=windows.source if windows else "none: this objective uses the weights alone",
        calibration_tokens=windows.tokens if windows else 0,
        calibration_sha256=windows.sha256 if windows else "",
        fingerprint=prepared.moments.fingerprint if prepared.moments else "",
        moments_reused=prepared.reused,
        predicted_divergence=prepared.plan.predicted_divergence,
        quality=measured,
        samples=samples,
        notes=prepared.plan.notes,
        keep=prepared.plan.keep,
        keep_model=prepared.plan.keep_model,
        parameters_before=prepared.plan.model_before,
        parameters_after=prepared.plan.model_after,
        target_before=prepared.plan.target_before,
        target_after=prepared.plan.target_after,
        bytes_before=prepared.plan.bytes_before,
        bytes_after=prepared.plan.bytes_after,
    )
    with staged_folder(out, overwrite) as folder:
        with watch.stage("write"):
            _write_model(folder, prepared, recipe)
        run = run.model_copy(update={"seconds": {**watch.seconds}, "peak_memory": peak_memory()})
        with watch.stage("report"):
            write_report(folder, run, prepared.plan, prepared.spectra.values)
        run = run.model_copy(
            update={"seconds": {**watch.seconds, "total": watch.total()}, "peak_memory": peak_memory()}
        )
        write_card(folder, run, prepared.plan)
        (folder / "run.json").write_text(run.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return run


def _files_read(recipe: Recipe, moments_file: Path | None) -> list[Path]:
    """The files that a run reads beside the model's folder."""
    texts = [one for one in recipe.calibration if one != "self"]
    names = [recipe.model, *texts, recipe.eval_text or "", str(moments_file or "")]
    return [Path(one) for name in names if name for one in glob.glob(name) or [name] if Path(one).exists()]  # noqa: PTH207


def _write_model(folder: Path, prepared: Prepared, recipe: Recipe) -> None:
    """The checkpoint and the values that made it: plan, recipe, spectra."""
    model, tokenizer = prepared.loaded.model, prepared.loaded.tokenizer
    cast_weights(model, prepared.loaded.stored_dtype)
    attach(model)
    with quiet_bars():
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _verify(folder, prepared.plan, model)
    prepared.plan.save(folder / "plan.json")
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    spectra = {name: torch.from_numpy(values.astype("float32")) for name, values in prepared.spectra.values.items()}
    save_file(spectra, folder / "spectra.safetensors")


def _evaluation_text(loaded: LoadedModel, recipe: Recipe) -> Tensor | None:
    """The windows of the evaluation text, read before any work so that a text that can't be used is refused at once."""
    if recipe.eval_text is None or recipe.eval_windows == 0:
        return None
    window = min(1024, positions(loaded.model) or 1024)
    return evaluation_windows(recipe.eval_text, need_tokenizer(loaded), window=window, windows=recipe.eval_windows)


def _measure(
    prepared: Prepared, recipe: Recipe, replaced: dict[str, nn.Module], windows: Tensor | None, *, quiet: bool
) -> Measured | None:
    """The quality of both models on the evaluation text, or on the held-out part of the calibration.

    A model without token logits is not measured, and one that predicts no next token is measured with a note.
    """
    model = prepared.loaded.model
    if recipe.eval_windows == 0:
        return None
    source = Path(recipe.eval_text or "").name
    if windows is None and prepared.windows is not None and len(prepared.windows.held_out):
        source = f"held-out {prepared.windows.source}"
        windows = prepared.windows.held_out[: recipe.eval_windows]
    if windows is None:
        return None
    try:
        with torch.no_grad():
            probe = getattr(model(input_ids=windows[:1, :8].to(model.device)), "logits", None)
    except Exception:  # an architecture that needs other inputs fails in its own way
        probe = None
    if probe is None or probe.dim() != 3 or probe.shape[-1] <= int(windows.max()):
        prepared.plan.notes.append("no quality was measured: this model gives no logits over its vocabulary")
        return None
    if not model.can_generate():
        prepared.plan.notes.append(
            "this model does not predict the next token, so its perplexity says little; its divergence is what counts"
        )

    def dense(ids: Tensor) -> Tensor:
        with dense_again(model, replaced):
            return model(input_ids=ids.to(model.device)).logits  # type: ignore[no-any-return]

    def factored(ids: Tensor) -> Tensor:
        return model(input_ids=ids.to(model.device)).logits  # type: ignore[no-any-return]

    original, smaller = measure_quality([dense, factored], windows, quiet=quiet)
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
    """Count what was really stored, so that no figure of the plan goes unchecked."""
    stored = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                numbers = 1
                for size in file.get_slice(name).get_shape():
                    numbers *= size
                stored += numbers
    guards = sum(1 for entry in plan.entries if entry.rank is not None)
    buffers = {id(b): b.numel() for n, b in model.named_buffers() if n in model.state_dict()}
    ours = guards + plan.order_numbers
    foreign = sum(buffers.values()) - ours
    if stored != plan.model_after + ours + foreign:
        raise RuntimeError(
            f"the checkpoint holds {stored} numbers, the plan says {plan.model_after + ours + foreign}; please report this"
        )
