"""Features of sentences and images, by which likeness is told: one vector each, of one length."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.model.blocks import has_two_stacks
from twofold.model.load import need_tokenizer
from twofold.model.processor import image_processor_of
from twofold.task import Batch, Data, Samples, task
from twofold.task.data.columns import Kind, Record
from twofold.task.data.examples import Example, Examples, ExampleTask
from twofold.task.data.images import load_image
from twofold.task.data.pooling import is_text, pooled, sees
from twofold.task.data.scores import rank_correlation
from twofold.task.data.words import ids_of
from twofold.task.output.gaussian import GAUSSIAN

SAME = 1e-5  # of a cosine; features that are no further apart say nothing


@task
class Embedding(ExampleTask):
    """Features on a sphere of radius √k, so that a nat is k times what their cosine lacks to 1; the noise has variance 1."""

    name, pipeline = "embedding", "feature-extraction"
    output = GAUSSIAN
    unit = "samples"
    mappings = ("",)

    def fits(self, model: Any) -> bool:
        two_towers = type(model).__name__.endswith(("ModelWithProjection", "CLIPModel"))
        return not has_two_stacks(model) and (two_towers or super().fits(model))

    def kind_of(self, loaded: Any) -> Kind:
        return "image" if sees(loaded.model) else "text"

    def encode(self, record: Record, loaded: Any) -> Iterable[Example]:
        model, about = loaded.model, record.fields.get("label")
        if not sees(model):
            second = record.fields.get("target")
            for text in [
                record.need("text"),
                *([second] if second else []),
            ]:  # a pair is two samples, one after the other
                yield Example(ids_of(need_tokenizer(loaded), loaded, text), 1, about if second else None)
            return
        pixels = dict(image_processor_of(loaded)(images=load_image(record.need("image")), return_tensors="pt"))
        words = ids_of(need_tokenizer(loaded), loaded, record.need("text")) if is_text(model) else {}
        yield Example({**words, **pixels}, 2 if words else 1, about)

    def data(self, loaded: Any, *settings: Any, **how: Any) -> Data:
        data = super().data(loaded, *settings, **how)
        batches = list(data.samples[:8])
        with torch.no_grad():
            features = torch.cat([self.outputs(loaded.model, batch) for batch in batches])
        if len(features) > 1 and float(torch.cosine_similarity(features, features[:1]).min()) > 1 - SAME:
            raise TwofoldError(
                "the model gives the same features for all samples, so there is nothing to keep; look at its weights"
            )
        return data

    def read(self, result: Any, batch: Batch, model: Any) -> Tensor:  # (vectors, k)
        features = pooled(result, model)
        return torch.nn.functional.normalize(features, dim=-1) * math.sqrt(features.shape[-1])

    @torch.no_grad()
    def score(self, loaded: Any, samples: Samples) -> dict[str, float]:
        """Return Spearman's correlation of cosines with the labels of pairs, or how often the nearest image is of its class."""
        assert isinstance(samples, Examples)
        abouts = [example.about for example in samples.examples]
        if None in abouts or samples.predictions > len(samples):
            return {}
        found: dict[int, Tensor] = {}
        for places, batch in samples.alike():
            found |= dict(zip(places, self.outputs(loaded.model, batch).cpu(), strict=True))
        features = torch.stack([found[i] for i in range(len(samples))])
        if not sees(loaded.model):
            cosines = torch.cosine_similarity(features[::2], features[1::2])
            return rank_correlation(cosines.tolist(), [float(label) for label in abouts[::2]])
        likeness = features @ features.T
        nearest = likeness.fill_diagonal_(-torch.inf).argmax(-1).tolist()
        return {"nearest_neighbour": sum(abouts[i] == abouts[j] for i, j in enumerate(nearest)) / len(abouts)}
