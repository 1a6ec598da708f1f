"""Text to text: translations, summaries; an encoder reads the one, a decoder writes the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.model.load import check_ids, need_tokenizer
from twofold.task import LABELS, Batch, Samples, task
from twofold.task.data.columns import Record
from twofold.task.data.examples import Example, ExampleTask, labelled
from twofold.task.data.logits import at_labels, logits_of
from twofold.task.data.scores import translation_scores
from twofold.task.data.words import ids_of
from twofold.task.output.categorical import CATEGORICAL
from twofold.task.text.row import BadRowError


@task
class Seq2Seq(ExampleTask):
    """The next token of a target, after the source and the target so far."""

    name = "seq2seq"
    output = CATEGORICAL
    perplexity = True
    reads, unit = "text", "pairs"
    mappings = ("SEQ_TO_SEQ_CAUSAL_LM",)

    def encode(self, record: Record, loaded: Any) -> Iterable[Example]:
        tokenizer, target = need_tokenizer(loaded), record.need("target")
        if not isinstance(target, str) or not target.strip():
            raise BadRowError("its target is empty or no text")
        batch = ids_of(tokenizer, loaded, record.need("text"))
        right = torch.tensor(tokenizer(text_target=target)["input_ids"])[None]
        check_ids(right, loaded)
        batch = {"input_ids": batch["input_ids"], "decoder_input_ids": after_start(right, loaded.model)}
        yield Example({**batch, **labelled(right)}, right.numel(), target)

    def read(self, result: Any, batch: Batch, model: Any) -> Tensor:  # (target tokens, vocabulary)
        return at_labels(logits_of(result, model, 3), batch)

    def score(self, loaded: Any, samples: Samples) -> dict[str, float]:
        """Return BLEU and chrF of what the model writes greedily."""
        written = []
        for batch in samples:
            ids = loaded.model.generate(
                batch["input_ids"].to(loaded.model.device),
                do_sample=False,
                num_beams=1,
                max_new_tokens=2 * batch[LABELS].numel() + 16,
            )
            written.append(need_tokenizer(loaded).decode(ids[0], skip_special_tokens=True))
        return translation_scores(written, [example.about for example in samples.examples])  # type: ignore[attr-defined]


def after_start(ids: Tensor, model: Any) -> Tensor:  # (1, length) to (1, length)
    """Return what the decoder is given to predict ids: its start token, and all but the last of them.

    Raises:
        TwofoldError: if the model's configuration names no such token.
    """
    settings = (model.config, getattr(model, "generation_config", None))
    start = next((s for c in settings if (s := getattr(c, "decoder_start_token_id", None)) is not None), None)
    if start is None:
        raise TwofoldError(
            "the model's configuration has no decoder_start_token_id, so what its decoder begins with is not known"
        )
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
