"""The main job, stage after stage: model → targets → moments → spectra → plan → factored model → checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from twofold.cache import cache_folder
from twofold.calibrate import (
    Moments,
    Request,
    TokenWindows,
    collect_moments,
    read_texts,
    request_statistics,
    sample_texts,
    token_windows,
)
from twofold.calibrate.texts import CHARACTERS_PER_TOKEN
from twofold.checkpoint import attach, staged_folder
from twofold.checkpoint.write import check_output, check_space
from twofold.errors import TwofoldError
from twofold.evaluate import evaluation_windows, measure_quality
from twofold.factorize import Spectra, apply_plan, decompose_targets, dense_again
from twofold.models import LoadedModel, load_model, need_tokenizer, quiet_bars
from twofold.objectives import Objective, get_objective
from twofold.plan import Plan, make_plan
from twofold.recipe import Recipe
from twofold.run import Measured, Run, Sample, Stopwatch, machine, peak_memory
from twofold.targets import Targets, find_groups, find_targets

HELD_OUT = 8  # windows set aside from the calibration text
SAMPLE_TOKENS = 48
QUESTION = "What is the capital of France, and why is it famous?"
BEGINNINGS = ("The history of the city begins", "In the morning, the children")


@dataclass
class Prepared:
    """All that stands before the factors: the model, its targets, moments, spectra and the plan."""

    loaded: LoadedModel
    targets: Targets
    objective: Objective
    windows: TokenWindows | None
    moments: Moments | None
    reused: bool
    spectra: Spectra
    plan: Plan


def model_hash(model: nn.Module) -> str:
    """The hash of a model's configuration and weights."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        settings = config.to_dict()
        for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
            settings.pop(volatile, None)
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data)
    return digest.hexdigest()


def calibration_windows(
    loaded: LoadedModel, recipe: Recipe, hashed: str, texts: Iterable[str] | None = None, *, quiet: bool = False
) -> TokenWindows:
    """The token windows to calibrate on: from texts, files or data sets, or sampled from the model itself."""
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and recipe.window > longest:
        if "window" in recipe.model_fields_set:
            raise TwofoldError(
                f"--window {recipe.window} is longer than this model's {longest} positions; use --window {longest}"
            )
        recipe = recipe.model_copy(update={"window": longest})
        if not quiet:
            _say(f"windows of {longest} tokens: this model has no more positions")
    tokenizer = need_tokenizer(loaded)
    if texts is not None or recipe.calibration != ["self"]:
        if "self" in recipe.calibration and texts is None:
            raise TwofoldError("'self' can't be mixed with calibration texts; name either")
        source = "given texts" if texts is not None else ", ".join(Path(one).name for one in recipe.calibration)
        needed = (recipe.tokens + HELD_OUT * recipe.window) * CHARACTERS_PER_TOKEN
        read = (
            texts
            if texts is not None
            else read_texts(
                recipe.calibration,
                characters=needed,
                tokenizer=tokenizer,
                dataset_config=recipe.dataset_config,
                dataset_split=recipe.dataset_split,
                text_column=recipe.text_column,
            )
        )
        return token_windows(
            read, tokenizer, tokens=recipe.tokens, window=recipe.window, held_out=HELD_OUT, source=source
        )
    count = max(recipe.tokens // recipe.window, 1)
    key = hashlib.sha256(f"{hashed} {recipe.seed} {count} {recipe.window}".encode()).hexdigest()[:24]
    path = cache_folder() / "samples" / f"{key}.safetensors"
    ids: Tensor | None = None
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                ids = file.get_tensor("ids")
        except (SafetensorError, OSError):
            ids = None
    if ids is None:
        # Held-out texts are drawn apart, so that the calibration does not depend on how many there are.
        ids = torch.cat(
            [
                sample_texts(
                    loaded.model, tokenizer, sequences=count, length=recipe.window, seed=recipe.seed, quiet=quiet
                ),
                sample_texts(
                    loaded.model, tokenizer, sequences=HELD_OUT, length=recipe.window, seed=recipe.seed + 1, quiet=True
                ),
            ]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file({"ids": ids}, temporary)
        temporary.replace(path)
    return TokenWindows(ids[:count], ids[count:], "texts sampled from the model itself", recipe.tokens)


def fingerprint(hashed: str, windows: TokenWindows, request: Request, recipe: Recipe, dtype: torch.dtype) -> str:
    """What moments belong to: the model's weights, the token ids, the seed and the settings that change them."""
    parts = {
        "model": hashed,
        "ids": windows.sha256,
        "shape": list(windows.ids.shape),
        "seed": recipe.seed,
        "batch": recipe.batch_size,
        "dtype": str(dtype),
        "request": request.sizes,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def moments_path(mark: str) -> Path:
    """The file of the moments of a fingerprint."""
    return cache_folder() / "moments" / f"{mark[:24]}.safetensors"


def prepare(
    recipe: Recipe,
    loaded: LoadedModel,
    watch: Stopwatch,
    *,
    texts: Iterable[str] | None = None,
    moments_file: Path | None = None,
    quiet: bool = False,
) -> Prepared:
    """All stages up to the plan.

    Args:
        texts: to calibrate on, in the place of the recipe's.
        moments_file: where the moments are kept; in the cache, by fingerprint, if it is None.
    """
    model = loaded.model
    objective = get_objective(recipe.objective)
    targets = find_targets(model, recipe.include, recipe.exclude)
    element = torch.empty(0, dtype=loaded.stored_dtype).element_size()
    if recipe.allocate == "uniform":
        make_plan(loaded.name, targets, None, recipe, element)  # refuses an impossible budget before any work
    else:
        make_plan(loaded.name, targets, None, recipe.model_copy(update={"allocate": "uniform"}), element)
    with watch.stage("hash"):
        hashed = model_hash(model)
    windows: TokenWindows | None = None
    moments: Moments | None = None
    reused = False
    if objective.needs:
        with watch.stage("texts"):
            windows = calibration_windows(loaded, recipe, hashed, texts, quiet=quiet)
            if windows.tokens < windows.asked - recipe.window and not quiet:
                _say(f"the calibration text gives {windows.tokens:,} tokens of the {windows.asked:,} asked for")
            sample = windows.ids[:1, :16].to(next(model.parameters()).device)
            targets = replace(targets, groups=find_groups(model, targets.targets, lambda: model(input_ids=sample)))
        request = request_statistics(targets.targets, targets.groups, objective.needs)
        mark = fingerprint(hashed, windows, request, recipe, next(model.parameters()).dtype)
        path = moments_file or moments_path(mark)
        if path.is_file():
            moments = _reuse(path, mark, named=moments_file is not None)
            reused = moments is not None
        if moments is None:
            about = {"model": loaded.name, "source": windows.source, "seed": str(recipe.seed)}
            with watch.stage("calibrate"):
                moments = collect_moments(
                    model,
                    targets.targets,
                    request,
                    windows.ids,
                    empty=Moments({}, 0, targets.groups, mark, about),
                    seed=recipe.seed,
                    batch_size=recipe.batch_size,
                    partial=path.with_suffix(".partial"),
                    quiet=quiet,
                )
            with watch.stage("save moments"):
                moments.save(path)
        elif not quiet:
            _say(f"the moments of an earlier run fit and are used again ({path})")
    with watch.stage("decompose"):
        spectra = decompose_targets(model, targets.targets, moments, objective, recipe.damping, quiet=quiet)
    with watch.stage("plan"):
        plan = make_plan(loaded.name, targets, spectra.values, recipe, element)
    return Prepared(loaded, targets, objective, windows, moments, reused, spectra, plan)


def _reuse(path: Path, mark: str, *, named: bool) -> Moments | None:
    """The saved moments; those in the cache that are not whole are collected again, those that the user named are refused."""
    try:
        return Moments.load(path, mark)
    except TwofoldError:
        if named:
            raise
        path.unlink(missing_ok=True)
        return None


def _say(text: str) -> None:
    import sys

    print(text, file=sys.stderr, flush=True)


def plan_model(recipe: Recipe, *, moments_file: Path | None = None, quiet: bool = False) -> Plan:
    """The plan of a recipe, carried out on nothing.

    If the recipe names a calibration, the plan is the one that ``compress`` makes, and the moments are kept for it. If it
    leaves the calibration to its default, nothing is calibrated: the ranks are uniform, and a note says so.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
    loaded = _load(recipe)
    needs = get_objective(recipe.objective).needs
    if needs and recipe.allocate != "uniform" and "calibration" not in recipe.model_fields_set and moments_file is None:
        element = torch.empty(0, dtype=loaded.stored_dtype).element_size()
        targets = find_targets(loaded.model, recipe.include, recipe.exclude)
        plan = make_plan(loaded.name, targets, None, recipe.model_copy(update={"allocate": "uniform"}), element)
        note = (
            f"no calibration was named, so these ranks are uniform and no loss is predicted; the {recipe.allocate} ranks "
            "need the moments: name --calibration FILE, or --calibration self"
        )
        return plan.model_copy(update={"notes": [*plan.notes, note]})
    return prepare(recipe, loaded, Stopwatch(), moments_file=moments_file, quiet=quiet).plan


def carry_out(prepared: Prepared, recipe: Recipe, watch: Stopwatch, *, quiet: bool = False) -> dict[str, nn.Module]:
    """Factorize the model by its plan; gives the dense modules that were replaced."""
    with watch.stage("factorize"):
        prepared.plan, replaced = apply_plan(
            prepared.loaded.model,
            prepared.plan,
            prepared.spectra,
            prepared.moments,
            prepared.objective,
            recipe.damping,
            prepared.loaded.stored_dtype,
            quiet=quiet,
        )
    return replaced


def compress(
    recipe: Recipe,
    out: Path,
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

    watch = Stopwatch()
    check_output(out, overwrite)
    with watch.stage("load"):
        loaded = _load(recipe)
    prepared = prepare(recipe, loaded, watch, moments_file=moments_file, quiet=quiet)
    check_space(out, int(prepared.plan.bytes_after * 1.05) + 20_000_000)
    model = loaded.model
    replaced = carry_out(prepared, recipe, watch, quiet=quiet)
    with watch.stage("measure"):
        measured = _measure(prepared, recipe, replaced, quiet=quiet)
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
    with watch.stage("write"), staged_folder(out, overwrite) as folder:
        model.to(loaded.stored_dtype)
        attach(model)
        with quiet_bars():
            model.save_pretrained(folder)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)
        _verify(folder, prepared.plan, model)
        prepared.plan.save(folder / "plan.json")
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        save_file(
            {name: torch.from_numpy(values.astype("float32")) for name, values in prepared.spectra.values.items()},
            folder / "spectra.safetensors",
        )
        run = run.model_copy(update={"seconds": {**watch.seconds}, "peak_memory": peak_memory()})
        write_report(folder, run, prepared.plan, prepared.spectra.values)
        run = run.model_copy(
            update={"seconds": {**watch.seconds, "total": watch.total()}, "peak_memory": peak_memory()}
        )
        write_card(folder, run, prepared.plan)
        (folder / "run.json").write_text(run.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return run


def _load(recipe: Recipe) -> LoadedModel:
    return load_model(
        recipe.model,
        dtype=recipe.dtype,
        device=recipe.device,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )


def _measure(prepared: Prepared, recipe: Recipe, replaced: dict[str, nn.Module], *, quiet: bool) -> Measured | None:
    """The quality of both models on the evaluation text, or on the held-out part of the calibration."""
    model, windows = prepared.loaded.model, None
    if recipe.eval_windows == 0:
        return None
    if recipe.eval_text is not None:
        source = Path(recipe.eval_text).name
        longest = getattr(model.config, "max_position_embeddings", None) or 1024
        windows = evaluation_windows(
            recipe.eval_text, need_tokenizer(prepared.loaded), window=min(1024, longest), windows=recipe.eval_windows
        )
    elif prepared.windows is not None and len(prepared.windows.held_out):
        source = f"held-out {prepared.windows.source}"
        windows = prepared.windows.held_out[: recipe.eval_windows]
    if windows is None:
        return None

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
    if tokenizer is None or not getattr(model, "can_generate", lambda: False)():
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


def factorize(
    model: Any,
    tokenizer: Any = None,
    *,
    texts: Iterable[str] | None = None,
    calibration: str | Path | list[str | Path] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Any:
    """Factorize a model: the main job in one call.

    >>> model = twofold.factorize("smollm2", keep=0.8, calibration="texts.txt")    # doctest: +SKIP
    >>> model.save_pretrained("small")                                             # doctest: +SKIP

    Args:
        model: a folder, a hub id, ``smollm2``, or a loaded transformers model, which is changed in place.
        tokenizer: of a loaded model.
        texts: an iterable of texts to calibrate on.
        calibration: text files or data set names; "self" (the default) samples texts from the model.
        settings: any field of ``twofold.Recipe``: keep or budget, tokens, objective, allocate, seed, …

    Returns:
        The model with ``FactoredLinear`` layers. ``model.twofold_plan`` tells what was done with every weight;
        ``save_pretrained``, ``push_to_hub``, ``generate`` and ``dequantize`` work as for any transformers model.

    Raises:
        TwofoldError: for whatever the caller can put right.
    """
    from twofold.recipe import make_recipe

    named = model if isinstance(model, str | Path) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if calibration is not None:
        settings["calibration"] = [
            str(c) for c in ([calibration] if isinstance(calibration, str | Path) else calibration)
        ]
    recipe = make_recipe({"model": str(named) or type(model).__name__, **settings})
    loaded = _load(recipe) if isinstance(model, str | Path) else _given(model, tokenizer, recipe)
    watch = Stopwatch()
    prepared = prepare(recipe, loaded, watch, texts=texts, quiet=quiet)
    carry_out(prepared, recipe, watch, quiet=quiet)
    result = loaded.model.to(loaded.stored_dtype)
    attach(result)
    result.twofold_plan = prepared.plan
    return result


def _given(model: Any, tokenizer: Any, recipe: Recipe) -> LoadedModel:
    from twofold.models import check_finite

    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TwofoldError(f"factorize takes a transformers model or its name, got {type(model).__name__}")
    check_finite(model, recipe.model)
    return LoadedModel(model, tokenizer, recipe.model, None, next(model.parameters()).dtype)
