"""Classes of the tokens of a text: names, parts of speech."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from twofold.model.load import need_tokenizer
from twofold.task import Batch, Samples, task
from twofold.task.data.columns import Record
from twofold.task.data.examples import Example, ExampleTask, labelled
from twofold.task.data.logits import accuracy, at_labels, class_of, logits_of
from twofold.task.data.words import ids_of
from twofold.task.output.categorical import CATEGORICAL
from twofold.task.text.row import BadRowError


@task
class TokenClassification(ExampleTask):
    """The class of each token. A list of words with a list of labels gives the classes, of the first token of each word."""

    name = pipeline = "token-classification"
    output = CATEGORICAL
    reads, unit = "text", "texts"
    mappings = ("TOKEN_CLASSIFICATION",)

    def encode(self, record: Record, loaded: Any) -> Iterable[Example]:
        words, labels = record.need("text"), record.fields.get("label")
        tokenizer = need_tokenizer(loaded)
        batch = ids_of(tokenizer, loaded, words, **({"is_split_into_words": True} if isinstance(words, list) else {}))
        count = batch["input_ids"].shape[1]
        if isinstance(words, list) and isinstance(labels, list):
            if len(words) != len(labels):
                raise BadRowError(f"it has {len(words)} words and {len(labels)} labels")
            places = tokenizer(words, is_split_into_words=True).word_ids()[:count]
            first = [i for i, word in enumerate(places) if word is not None and word not in places[:i]]
            right = [-1] * count
            for place in first:
                right[place] = class_of(labels[places[place]], loaded.model)
            batch |= labelled(right)
            count = sum(label >= 0 for label in right)
        yield Example(batch, count)

    def read(self, result: Any, batch: Batch, model: Any) -> Tensor:  # (tokens, classes)
        return at_labels(logits_of(result, model, 3), batch)

    def score(self, loaded: Any, samples: Samples) -> dict[str, float]:
        return accuracy(self, loaded.model, samples)
