"""Classes of sentences, and of pairs of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from twofold.model.load import need_tokenizer
from twofold.task import Batch, Samples, task
from twofold.task.data.columns import Record
from twofold.task.data.examples import Example, ExampleTask
from twofold.task.data.logits import accuracy, class_label, logits_of
from twofold.task.data.words import ids_of
from twofold.task.output.categorical import CATEGORICAL


@task
class SequenceClassification(ExampleTask):
    """The class of a sentence, or of a pair; one number is taken for the log-odds of yes, as rerankers give it."""

    name, pipeline = "sequence-classification", "text-classification"
    output = CATEGORICAL
    reads, unit = "text", "sentences"
    mappings = ("SEQUENCE_CLASSIFICATION",)

    def encode(self, record: Record, loaded: Any) -> Iterable[Example]:
        texts = [record.need("text"), *([record.fields["target"]] if record.fields.get("target") else [])]
        batch = ids_of(need_tokenizer(loaded), loaded, *texts)
        yield Example({**batch, **class_label(record, loaded.model)})

    def read(self, result: Any, batch: Batch, model: Any) -> Tensor:  # (sentences, classes)
        logits = logits_of(result, model, 2)
        return logits if logits.shape[-1] > 1 else torch.cat([torch.zeros_like(logits), logits], -1)

    def score(self, loaded: Any, samples: Samples) -> dict[str, float]:
        return accuracy(self, loaded.model, samples)
