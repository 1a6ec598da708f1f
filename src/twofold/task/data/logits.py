"""Logits at the places that count, and what is right of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.task import LABELS, Batch, Samples, Task
from twofold.task.data.columns import Record


def logits_of(result: Any, model: Any, dimensions: int) -> Tensor:
    """Return the logits in what a model gives.

    Raises:
        TwofoldError: if there are none of so many dimensions.
    """
    logits = getattr(result, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != dimensions:
        raise TwofoldError(f"{type(model).__name__} gives no logits of {dimensions} dimensions")
    return logits


def at_labels(
    logits: Tensor,  # (batch, length, classes)
    batch: Batch,
) -> Tensor:  # (predictions, classes)
    """Return the logits of the places that have a label; of all where none is known."""
    flat = logits.flatten(0, 1)
    if LABELS not in batch:
        return flat
    known = batch[LABELS].flatten() >= 0
    return flat if bool(known.all()) else flat[known.to(flat.device)]


@torch.no_grad()
def accuracy(task: Task, model: Any, samples: Samples) -> dict[str, float]:
    """Return the share of the labelled predictions that are right; nothing if no label is known."""
    right = known = 0
    for batch in samples:
        labels = task.labels(batch)
        if labels is None:
            continue
        found = task.outputs(model, batch).argmax(-1).cpu()
        right, known = right + int((found == labels).sum()), known + len(labels)
    return {"accuracy": right / known} if known else {}


def class_label(record: Record, model: Any) -> dict[str, Tensor]:
    """Return the class that a record names, as a part of its batch; nothing if it names none, or none of the model's."""
    label = record.fields.get("label")
    number = -1 if label is None or model.config.num_labels < 2 else class_of(label, model)
    return {LABELS: torch.tensor([[number]])} if 0 <= number < model.config.num_labels else {}


def class_of(label: Any, model: Any) -> int:
    """Return the number of a class: itself, or that of its name in the model's configuration; −1 if it is unknown."""
    if isinstance(label, int) and not isinstance(label, bool):
        return label
    known = {str(name): int(i) for name, i in (getattr(model.config, "label2id", None) or {}).items()}
    text = str(label)
    return known.get(text, int(text) if text.isdigit() else -1)
