"""TRL's SFTTrainer with what it lacks here: a held-out loss over tokens, an end at the first NaN, and whole checkpoints."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback
from trl import SFTTrainer, pack_dataset

from twofold.errors import TwofoldError
from twofold.host.clock import return_memory
from twofold.host.files import write_text
from twofold.host.quiet import quiet_bars, silence
from twofold.model.frozen import evaluating
from twofold.tuning.bar import LossBar
from twofold.tuning.head import fuse_compact_head, learnt_loss, row_head
from twofold.tuning.tokens import Example

WHOLE = "whole.json"  # stands in a checkpoint that was written to its end


class NotFiniteError(Exception):
    """The loss or a gradient became NaN or infinite; no step was made with it."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} at step {step}")
        self.what, self.step = what, step


class RowTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains on rows that are tokens already."""

    def __init__(self, *args: Any, held_out: list[Example], watch: Watch, hooks: list[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.processing_class = None  # it would write its special tokens into the model's configuration
        fuse_compact_head(self.model)
        ids = torch.tensor([self.train_dataset[0]["input_ids"]], device=self.args.device)
        alone = self.accelerator.num_processes == 1 and not self.aux_loss_enabled
        self.head = row_head(self.model, ids) if alone else None
        self.held_out, self.watch, self.hooks = held_out, watch, hooks
        self.control: Any
        self.add_callback(watch)  # the last one, so that its mark says that all others are done

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        hooks = self.hooks if self.optimizer is None else []
        optimizer = super().create_optimizer(*args, **kwargs)
        for hook in hooks:
            hook.attach(self.optimizer)
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise NotFiniteError("the loss is not a finite number", self.state.global_step + 1)
        return_memory()  # rows of many lengths would leave it in pieces that the next row does not fit in
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean over the learnt tokens of all micro-batches of a step."""
        own = None if self.head is None or return_outputs else learnt_loss(model, self.head, inputs)
        if own is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        summed, count = own
        return summed / (count if num_items_in_batch is None else num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the loss on the held-out rows: the mean over all tokens that are learnt, not over rows or batches."""
        metrics = {"eval_loss": self.held_out_loss()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Measure the loss in nats a token, each row read alone."""
        total, count = 0.0, 0
        with evaluating(self.model):
            for example in self.held_out:
                row = {"input_ids": example.input_ids, "labels": example.labels}
                inputs = {name: torch.tensor([values], device=self.args.device) for name, values in row.items()}
                own = None if self.head is None else learnt_loss(self.model, self.head, inputs)
                if own is None:
                    scored = self.model(**inputs, fused_lm_head=True)
                    own = -scored.log_probs.double().sum(), int(scored.label_mask.sum())
                total += float(own[0])
                count += own[1]
                return_memory()
        return total / max(count, 1)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card for a checkpoint."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """The bar, the look at the gradients, and the mark of a whole checkpoint."""

    def __init__(self, bar: LossBar, model: nn.Module) -> None:
        self.bar, self.model = bar, model
        self._begun = 0.0
        self._times: list[float] = []

    @property
    def step_seconds(self) -> float:
        """Return the median of what the steps took."""
        return statistics.median(self._times) if self._times else 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._times.append(time.perf_counter() - self._begun)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.begin(state.max_steps, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise NotFiniteError("a gradient is not finite", state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.bar.show(state.global_step, logs.get("loss"), logs.get("eval_loss"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_text(folder / WHOLE, json.dumps({"step": state.global_step}) + "\n")


def last_whole(folder: Path) -> Path | None:
    """Find the newest checkpoint that was written to its end; remove what a kill left of others."""
    checkpoints: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (path / WHOLE).is_file():
            checkpoints[int(number)] = path
        else:
            shutil.rmtree(path, ignore_errors=True)
    return checkpoints[max(checkpoints)] if checkpoints else None


def as_dataset(examples: list[Example]) -> datasets.Dataset:
    """Return a data set of ``input_ids`` and ``labels``."""
    columns = {"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]}
    return datasets.Dataset.from_dict(columns)


def packed(examples: list[Example], length: int) -> datasets.Dataset:
    """Put rows into windows of at most ``length`` tokens, none cut; TRL's best-fit decreasing."""
    return pack_dataset(as_dataset(examples), length, "bfd", {"batch_size": len(examples)})


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the notes and bars of transformers, TRL, PEFT and datasets out of our output."""
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with silence("trl", "peft", "accelerate", "datasets"), quiet_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a full disk does to a checkpoint into one sentence.

    Raises:
        TwofoldError: if there is no space.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = any(words in str(error) for words in ("No space left", "os error 28", "PytorchStreamWriter failed"))
        if not full and getattr(error, "errno", None) not in (28, 122):
            raise
        newest = last_whole(folder)
        rest = f"the state of {newest.name} is kept" if newest is not None else "no checkpoint was kept"
        raise TwofoldError(
            f"no space for a checkpoint in {folder}; {rest}: free some space and run the same command again, or save less often "
            "with `save_every`"
        ) from error
