"""Speech to text: a decoder that writes what an encoder hears (Whisper), or a class for each frame (CTC)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from twofold.model.blocks import has_two_stacks
from twofold.model.load import need_tokenizer
from twofold.model.processor import feature_extractor_of
from twofold.task import Batch, Samples, classes_of, task
from twofold.task.data.audio import load_audio
from twofold.task.data.columns import Record
from twofold.task.data.examples import Example, Examples, ExampleTask, labelled
from twofold.task.data.logits import at_labels, logits_of
from twofold.task.data.scores import word_error_rate
from twofold.task.data.transcript import transcript_of, words_of
from twofold.task.output.categorical import CATEGORICAL


@task
class Speech(ExampleTask):
    """The next token of the model's own transcript, or the class of each frame."""

    name, pipeline = "speech", "automatic-speech-recognition"
    output = CATEGORICAL
    reads, unit = "audio", "clips"
    each = 2

    def fits(self, model: Any) -> bool:
        kind = type(model).__name__
        return kind in classes_of("CTC") or (kind in classes_of("SPEECH_SEQ_2_SEQ") and has_two_stacks(model))

    def encode(self, record: Record, loaded: Any) -> Iterable[Example]:
        extractor, model = feature_extractor_of(loaded), loaded.model
        rate = int(extractor.sampling_rate)
        wave = load_audio(record.need("audio"), rate)
        batch = {k: v for k, v in extractor(wave, sampling_rate=rate, return_tensors="pt").items() if "mask" not in k}
        about: dict[str, Any] = {"seconds": len(wave) / rate, "words": record.fields.get("text")}
        if not has_two_stacks(model):
            frames = int(model._get_feat_extract_output_lengths(torch.tensor(next(iter(batch.values())).shape[-1])))
            yield Example(batch, frames, about)
            return
        # Nothing is right or wrong: what the model itself hears is what it goes on from.
        start = time.perf_counter()
        ids, prompt = transcript_of(model, batch, about["seconds"], loaded.hashed)
        about |= {"by": loaded.name, "took": time.perf_counter() - start, "ids": ids[0, prompt:]}
        right = ids[:, 1:].clone()
        right[:, : prompt - 1] = -1  # given, not predicted
        batch |= {"decoder_input_ids": ids[:, :-1], **labelled(right)}
        yield Example(batch, int((right >= 0).sum()), about)

    def read(self, result: Any, batch: Batch, model: Any) -> Tensor:  # (tokens or frames, classes)
        return at_labels(logits_of(result, model, 3), batch)

    def score(self, loaded: Any, samples: Samples) -> dict[str, float]:
        """Return the word error rate of what the model hears greedily, and its time over that of the speech."""
        assert isinstance(samples, Examples)
        abouts, tokenizer = [example.about for example in samples.examples], need_tokenizer(loaded)
        heard, took = [], 0.0
        for about, batch in zip(abouts, samples, strict=True):
            if about.get("by") == loaded.name:  # it has written the transcript
                heard.append(tokenizer.decode(about["ids"], skip_special_tokens=True))
                took += about["took"]
                continue
            start = time.perf_counter()
            heard.append(words_of(loaded.model, tokenizer, batch, about["seconds"]))
            took += time.perf_counter() - start
        known = [(words, about["words"]) for words, about in zip(heard, abouts, strict=True) if about["words"]]
        rate = word_error_rate([w for w, _ in known], [r for _, r in known], tokenizer) if known else {}
        return {**rate, "real_time_factor": took / sum(about["seconds"] for about in abouts)}
