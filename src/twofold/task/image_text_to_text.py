"""Pictures with text: models that look at a picture and write about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.model.load import need_tokenizer
from twofold.model.processor import image_processor_of, processor_of
from twofold.task import Batch, task
from twofold.task.data.columns import Record
from twofold.task.data.examples import Example, ExampleTask, labelled
from twofold.task.data.images import load_image
from twofold.task.data.logits import at_labels, logits_of
from twofold.task.output.categorical import CATEGORICAL


@task
class ImageTextToText(ExampleTask):
    """The next token of a text that begins with a picture. For text alone there is causal-lm."""

    name = pipeline = "image-text-to-text"
    output = CATEGORICAL
    perplexity = True
    reads, unit = "image", "pictures with text"
    mappings = ("IMAGE_TEXT_TO_TEXT",)

    def encode(self, record: Record, loaded: Any) -> Iterable[Example]:
        image, text = load_image(record.need("image")), record.need("text")
        need_tokenizer(loaded), image_processor_of(loaded)  # each named where it is missing
        processor = processor_of(loaded)
        mark = getattr(processor, "image_token", None)
        if mark is None:
            raise TwofoldError(
                f"{type(processor).__name__} has no token for pictures, so none can be put into a text; use `task=causal-lm`"
            )
        batch = {
            k: v
            for k, v in processor(images=[image], text=f"{mark}{text}", return_tensors="pt").items()
            if k != "attention_mask"
        }
        ids = batch["input_ids"]
        right = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1)
        right[right == loaded.tokenizer.convert_tokens_to_ids(mark)] = -1  # a picture is not written
        yield Example({**batch, **labelled(right)}, int((right >= 0).sum()))

    def read(self, result: Any, batch: Batch, model: Any) -> Tensor:  # (tokens, vocabulary)
        return at_labels(logits_of(result, model, 3), batch)
