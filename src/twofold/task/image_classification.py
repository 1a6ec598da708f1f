"""Classes of images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from twofold.model.processor import image_processor_of
from twofold.task import Batch, Samples, task
from twofold.task.data.columns import Record
from twofold.task.data.examples import Example, ExampleTask
from twofold.task.data.images import load_image
from twofold.task.data.logits import accuracy, class_label, logits_of
from twofold.task.output.categorical import CATEGORICAL


@task
class ImageClassification(ExampleTask):
    """The class of an image. A folder of folders gives the classes by their names."""

    name = pipeline = "image-classification"
    output = CATEGORICAL
    reads, unit = "image", "images"
    mappings = ("IMAGE_CLASSIFICATION",)

    def encode(self, record: Record, loaded: Any) -> Iterable[Example]:
        image = load_image(record.need("image"))
        batch = dict(image_processor_of(loaded)(images=image, return_tensors="pt"))
        yield Example({**batch, **class_label(record, loaded.model)})

    def read(self, result: Any, batch: Batch, model: Any) -> Tensor:  # (images, classes)
        return logits_of(result, model, 2)

    def score(self, loaded: Any, samples: Samples) -> dict[str, float]:
        return accuracy(self, loaded.model, samples)
