"""A fine-tuning from rows to the folder that is written; a run that was killed goes on from its last checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

from peft import PeftModel
from transformers import EarlyStoppingCallback, PrinterCallback
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from twofold.checkpoint.beside import ADAPTER, WHOLE
from twofold.errors import TwofoldError
from twofold.host.clock import Stopwatch, machine, peak_memory
from twofold.host.faults import decorating
from twofold.host.files import write_text
from twofold.host.folders import check_apart, check_output, check_space, staged_folder
from twofold.host.progress import say
from twofold.host.unfinished import BEFORE, Work, working
from twofold.model.generation import generating_plainly
from twofold.model.load import LoadedModel, load_model
from twofold.model.written import Companions, save_like
from twofold.report.record import Sample
from twofold.settings.base import from_call
from twofold.task.text.sources import data_files
from twofold.task.text.special import pad_id
from twofold.tuning.bar import LossBar
from twofold.tuning.estimate import TuneEstimate
from twofold.tuning.methods import WHOLE_MODEL, Method, apply_method
from twofold.tuning.optimizers import optimizer_arguments
from twofold.tuning.prepare import Prepared, prepare, summary
from twofold.tuning.record import Point, TuneRun, draw_curve, write_card
from twofold.tuning.samples import answers, held_out_prompts
from twofold.tuning.settings import TuneSettings, make_settings
from twofold.tuning.trainer import (
    NotFiniteError,
    RowTrainer,
    Watch,
    as_dataset,
    disk_errors,
    last_whole,
    quiet_libraries,
)
from twofold.version import __version__

CHECKPOINTS = "tune"  # the part of the unfinished state that is kept after a kill
KEPT = 2  # checkpoints at a time
Given: TypeAlias = TuneSettings | Mapping[str, Any] | str


@overload
def tune(
    settings: Given,
    out: Path | str,
    *,
    dry_run: Literal[False] = False,
    overwrite: bool = False,
    quiet: bool = False,
    **more: Any,
) -> TuneRun: ...
@overload
def tune(settings: Given, out: Path | str, *, dry_run: Literal[True], **more: Any) -> TuneEstimate: ...
def tune(
    settings: Given,
    out: Path | str,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **more: Any,
) -> TuneRun | TuneEstimate:
    """Fine-tune a model, and write the adapter or the model with its record, curve and card.

    Started again with the same settings and output, a run that was stopped goes on from its last checkpoint, and ends with the
    same weights, to the bit where one thread does the work.

    >>> twofold.tune("small", "tuned", data="rows.jsonl")    # doctest: +SKIP

    Args:
        settings: those of the fine-tuning, or the name of the model.
        dry_run: estimate what it would take, and do nothing.
        more: any settings, where the model is named.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
    settings = from_call(TuneSettings, make_settings, settings, more)
    if dry_run:
        with quiet_libraries():
            estimate = prepare(settings, must_estimate=True).estimate
        assert estimate is not None
        return estimate
    out = Path(out).expanduser().resolve()
    watch = Stopwatch()
    check_output(out, overwrite)
    with watch.stage("read"), quiet_libraries():
        prepared = prepare(settings)
    if not quiet:
        say(summary(prepared.rows, prepared.examples))
    with watch.stage("load"), quiet_libraries():
        how = settings.model_dump(include={"dtype", "device", "trust_remote_code", "dequantize"})
        loaded = load_model(settings.model, **how)
        check_apart(out, [loaded.source], [file for source in settings.data for file in data_files(source)])
        base = loaded.shards.hash("") if loaded.shards is not None else ""
    about = f"{__version__} {settings.model_dump_json()} {prepared.examples.sha256} {base}"
    with working(out, settings.model) as work:
        work.belongs_to(hashlib.sha256(about.encode()).hexdigest())
        work.update(stage="tuning")
        prepared.settings = _settled(prepared.settings, work.folder / CHECKPOINTS / "settings.json")
        return _Tuning(prepared, loaded, base, work, watch, quiet=quiet).run(out, overwrite)


def _settled(settings: TuneSettings, path: Path) -> TuneSettings:
    """Return what was chosen for the memory when the run began: a run that is taken up again does the same."""
    if path.is_file():
        return TuneSettings.model_validate_json(path.read_text(encoding="utf-8"))
    write_text(path, settings.model_dump_json(indent=1) + "\n")
    return settings


class _Tuning:
    """One run, with all that it needs at hand."""

    def __init__(
        self, prepared: Prepared, loaded: LoadedModel, base: str, work: Work, watch: Stopwatch, *, quiet: bool
    ) -> None:
        self.prepared, self.loaded, self.base = prepared, loaded, base
        self.companions = Companions.of(loaded, WHOLE if prepared.settings.method in WHOLE_MODEL else ADAPTER)
        self.settings, self.examples, self.steps = prepared.settings, prepared.examples, prepared.steps
        self.work, self.watch, self.bar = work, watch, LossBar(quiet=quiet)
        self.folder = work.folder / CHECKPOINTS
        self.parameters = sum(p.numel() for p in loaded.model.parameters())

    def run(self, out: Path, overwrite: bool) -> TuneRun:
        model, notes = self.loaded.model, self.prepared.notes
        prompts = held_out_prompts(self.examples)
        before = self._answers(model, prompts, notes)
        # Checkpoints hold how the model generates, and transformers writes no settings that it would not take.
        with generating_plainly(model):
            method, trainer, resume, first = self._train()
        record = self._record(method, trainer, resume, first)
        after = self._answers(method.model, prompts, record.notes) if before else []
        texts = (self.loaded.tokenizer.decode(prompt) for prompt in prompts)
        said = zip(texts, before, after, strict=False)  # none where the answers failed
        record.samples = [Sample(prompt=text, original=first, factored=then) for text, first, then in said]
        with staged_folder(out, overwrite) as folder:
            with self.watch.stage("write"), quiet_libraries():
                save(method, self.loaded, folder)
                self.companions.write(folder)
            with decorating("figure", record.notes):
                draw_curve(record, folder / "loss.svg")
            with decorating("card", record.notes):
                write_card(record, folder)
            record.seconds = {**self.watch.seconds, "total": self.watch.total()}
            record.peak_memory = peak_memory()
            (folder / "run.json").write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return record

    def _train(self) -> tuple[Method, RowTrainer, Path | None, float | None]:
        """Train, and return the method, the trainer, the checkpoint that it went on from and the held-out loss of before."""
        model, examples = self.loaded.model, self.examples
        with self.watch.stage("prepare"), quiet_libraries():
            method = apply_method(model, self.settings, examples=examples.train, steps=self.steps, folder=self.folder)
            stored = method.trainable if isinstance(method.model, PeftModel) else self.parameters
            check_space(self.folder, (stored * 4 + method.trainable * 8) * KEPT + 20_000_000)
            trainer = self._trainer(method)
        resume = last_whole(self.folder)
        try:
            with self.watch.stage("train"), quiet_libraries(), disk_errors(self.folder):
                first = self._first_loss(trainer)
                trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
        except NotFiniteError as error:
            self._keep_good(method, error)
        finally:
            self.bar.end()
        return method, trainer, resume, first

    def _answers(self, model: Any, prompts: list[list[int]], notes: list[str]) -> list[str]:
        """Return what a model answers to prompts; none where it can't, with a note."""
        with decorating("sample answers", notes):
            return answers(model, self.loaded.tokenizer, prompts)
        return []

    def _trainer(self, method: Method) -> RowTrainer:
        settings, examples = self.settings, self.examples
        look, save = settings.intervals(self.steps)
        measured = bool(examples.held_out)
        config = SFTConfig(
            output_dir=str(self.folder),
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=settings.batch // settings.micro_batch,
            max_steps=self.steps,
            learning_rate=settings.rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(settings.warmup * self.steps),
            weight_decay=settings.weight_decay,
            **optimizer_arguments(method.model, settings),
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if measured else "no",
            eval_steps=look,
            save_strategy="steps" if settings.keeps_checkpoints else "no",
            save_steps=save,
            save_total_limit=KEPT,
            load_best_model_at_end=bool(settings.patience),
            restore_callback_states_from_checkpoint=bool(settings.patience),
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            seed=settings.seed,
            data_seed=settings.seed,
            max_length=None,
            bf16=False,
            gradient_checkpointing=settings.gradient_checkpointing,
            use_cpu=self.loaded.model.device.type == "cpu",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to=[],
        )
        tokenizer = self.loaded.tokenizer
        callbacks: list[Any] = [*method.callbacks]
        if settings.patience:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=settings.patience))
        trainer = RowTrainer(
            model=method.model,
            args=config,
            train_dataset=self.prepared.windows,
            eval_dataset=as_dataset(examples.held_out) if measured else None,
            processing_class=tokenizer,
            # A collator of ours: TRL's own needs a word to pad with, and writes it into the model's configuration.
            data_collator=DataCollatorForLanguageModeling(
                pad_token_id=pad_id(tokenizer, self.loaded.model), padding_free=settings.packing
            ),
            callbacks=callbacks,
            held_out=examples.held_out,
            watch=Watch(self.bar, method.model),
            hooks=method.optimizer_hooks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _first_loss(self, trainer: RowTrainer) -> float | None:
        """Return the held-out loss before the training; kept, since a run that is taken up again has the model of later."""
        if not self.examples.held_out:
            return None
        known = self.work.state.measured.get(BEFORE)
        if known is not None:
            return float(known["loss"] or 0.0)
        loss = trainer.held_out_loss()
        if not math.isfinite(loss):
            raise TwofoldError("the loss of the model on the held-out rows is not finite; the model can't be trained")
        self.work.update(measured={BEFORE: {"loss": loss}})
        return loss

    def _keep_good(self, method: Method, error: NotFiniteError) -> None:
        """Keep the weights of before the step that failed, and say where.

        Raises:
            TwofoldError: always.
        """
        good = self.folder / "last-good"
        with quiet_libraries():
            save(method, self.loaded, good)
            self.companions.write(good)
        raise TwofoldError(
            f"{error.what} at step {error.step}, so the training stopped; the state of step {error.step - 1} is kept in {good}: "
            f"take a smaller `learning_rate` than {self.settings.rate:g} and another `out`, or look at the rows"
        ) from error

    def _record(self, method: Method, trainer: RowTrainer, resume: Path | None, first: float | None) -> TuneRun:
        examples, estimate = self.examples, self.prepared.estimate
        history, last = trainer.state.log_history, trainer.state.global_step
        held_out = [Point(step=entry["step"], loss=entry["eval_loss"]) for entry in history if "eval_loss" in entry]
        after = held_out[-1].loss if held_out else None
        if examples.held_out and (self.settings.patience or not held_out or held_out[-1].step != last):
            after = trainer.held_out_loss()  # of the best state, which was put back; or it was not measured at the end
        if first is not None:
            held_out = [Point(step=0, loss=first), *held_out]
        return TuneRun(
            settings=self.settings,
            machine=machine(self.loaded.model.device, next(method.model.parameters()).dtype),
            base_sha256=self.base,
            data_sha256=examples.sha256,
            rows=len(examples.train),
            rows_held_out=len(examples.held_out),
            rows_skipped=self.prepared.rows.skipped,
            rows_cut=examples.cut,
            rows_too_long=examples.left_out,
            windows=len(self.prepared.windows),
            tokens=sum(len(example.input_ids) for example in examples.train),
            tokens_learnt=sum(example.learnt for example in examples.train),
            trainable=method.trainable,
            parameters=self.parameters,
            steps=last,
            steps_planned=self.steps,
            resumed=int(resume.name.rpartition("-")[2]) if resume is not None else 0,
            held_out_before=first,
            held_out_after=after,
            curve=[Point(step=entry["step"], loss=entry["loss"]) for entry in history if "loss" in entry],
            held_out_curve=held_out,
            steps_shortened=sum(hook.shortened for hook in method.optimizer_hooks),
            step_seconds=trainer.watch.step_seconds,
            estimated_memory=estimate.memory if estimate is not None else 0,
            notes=[*self.prepared.notes, *self.companions.notes],
            **self.companions.record,
        )


def save(method: Method, loaded: LoadedModel, folder: Path) -> None:
    """Write the adapter, or the model with the adapter put into it."""
    model = method.model.merge_and_unload() if method.merged else method.model
    if not method.adapter:
        save_like(loaded, model, folder)
    elif method.initial is not None:
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(method.initial))
    else:
        config = model.peft_config["default"]
        if hasattr(config, "eva_config"):  # where it starts is no matter for who loads it
            config.eva_config = None
            config.init_lora_weights = True
        model.save_pretrained(folder)
