"""What is known of a fine-tuning before the weights are loaded: the rows as tokens, the steps, and what it will take."""

from __future__ import annotations

import math
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from twofold.errors import TwofoldError
from twofold.model.load import check_ids, load_skeleton, load_tokenizer, window_limit
from twofold.settings.sizes import parse_bytes
from twofold.task.causal_lm import need_writer
from twofold.task.text.settings import Reading
from twofold.task.text.special import check_known, end_id
from twofold.tuning.estimate import TuneEstimate, choose, estimate
from twofold.tuning.methods import check_method
from twofold.tuning.optimizers import check_layers, check_optimizer
from twofold.tuning.rows import Rows, read_rows
from twofold.tuning.settings import TuneSettings
from twofold.tuning.tokens import Examples, encode_rows
from twofold.tuning.trainer import as_dataset, packed


@dataclass
class Prepared:
    """What is known before the weights are loaded."""

    settings: TuneSettings  # as they were chosen for the memory
    rows: Rows
    examples: Examples
    windows: Any  # the data set of rows, or of packed windows
    steps: int
    estimate: TuneEstimate | None = None  # None where the architecture can't be run without weights
    notes: list[str] = field(default_factory=list)


def prepare(settings: TuneSettings, *, must_estimate: bool = False) -> Prepared:
    """Read the rows, and tell what the run will take.

    Args:
        must_estimate: fail where it can't be told.

    Raises:
        TwofoldError: for whatever the user can put right.
    """
    check_optimizer(settings)
    rows = read_rows(settings.data, **settings.model_dump(include={*Reading.model_fields}))
    how = settings.model_dump(include={"trust_remote_code", "dequantize"})
    skeleton = load_skeleton(settings.model, **how)
    model, tokenizer = skeleton.model, load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
    need_writer(model, settings.model, "so it can't learn rows")
    skeleton.tokenizer = tokenizer
    notes = name_the_end(tokenizer, model)
    check_method(model, settings)
    check_layers(model, settings)
    length = min(settings.length, window_limit(model) or settings.length)
    settings = settings.model_copy(update={"length": length})
    examples = encode_rows(
        rows.rows,
        tokenizer,
        length=length,
        long=settings.long,
        loss=settings.loss,
        skip_bad=settings.skip_bad,
        held_out=settings.held_out,
        seed=settings.seed,
        tally=rows.tally,
    )
    ids = [token for row in (*examples.train, *examples.held_out) for token in row.input_ids]
    check_ids(torch.tensor(ids), skeleton)
    check_known(tokenizer, ids, "the rows")
    windows = packed(examples.train, length) if settings.packing else as_dataset(examples.train)
    steps = settings.steps or max(1, math.ceil(math.ceil(len(windows) / settings.batch) * settings.epochs))
    settings.intervals(steps)
    sizes = [len(ids) for ids in windows["input_ids"]]
    shape: dict[str, Any] = {"longest": max(sizes), "mean": sum(sizes) / len(sizes), "steps": steps}
    prepared = Prepared(settings, rows, examples, windows, steps, notes=[*notes, *rows.tally.sentences])
    if settings.memory is None:
        with nullcontext() if must_estimate else suppress(TwofoldError):
            prepared.estimate = estimate(settings, **shape)
        return prepared
    prepared.settings, prepared.estimate = choose(settings, int(parse_bytes(settings.memory, "memory")), **shape)
    method, optimizer = prepared.settings.method, prepared.settings.optimizer
    if method != settings.method:
        prepared.notes.append(
            f"{settings.method} does not fit in {settings.memory}, so {method} was trained in its place"
            + (f", by adamw and not by {settings.optimizer}" if optimizer != settings.optimizer else "")
        )
    return prepared


def name_the_end(tokenizer: Any, model: Any) -> list[str]:
    """Give a tokenizer without an end token the one that the model's configuration names, and return what is to be said of it."""
    if tokenizer.eos_token_id is not None:
        return []
    end = end_id(tokenizer, model)
    if end is None:
        return [
            "neither the tokenizer nor config.json names an end token that both know, so rows that no chat template renders end "
            "without one, and the model does not learn where an answer ends"
        ]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return [
        f"the tokenizer names no end token, so rows end with the one of the model's configuration, {tokenizer.eos_token}"
    ]


def summary(rows: Rows, examples: Examples) -> str:
    """Describe the rows in one line."""
    parts = [f"{len(examples.train):,} rows to train on, {len(examples.held_out):,} held out"]
    if examples.cut:
        parts.append(f"{examples.cut:,} cut to `length`")
    if examples.left_out:
        parts.append(f"{examples.left_out:,} left out that are longer")
    return "; ".join([*parts, *rows.tally.sentences])
