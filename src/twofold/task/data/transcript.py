"""What a speech model hears, greedily: the ids that its decoder is given and writes, and the words."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from twofold.host.faults import models_errors
from twofold.host.quiet import first_line, quiet_bars
from twofold.model.blocks import has_two_stacks
from twofold.task import LABELS, Batch
from twofold.task.text.kept import kept_ids

# Nobody says more than some four words a second; a greedy decoder that repeats itself without an end is cut there.
PER_SECOND, LEAST = 8, 16  # tokens
GIVEN = 8  # positions that are left for the tokens that a decoder is given
OF_DECODER = (LABELS, "decoder_input_ids")


def transcript_of(
    model: Any, batch: Batch, seconds: float, hashed: str = ""
) -> tuple[Tensor, int]:  # (1, length), those given
    """Return all ids of the decoder, from its start to the end, and how many of them it was given to begin with.

    Args:
        seconds: of speech, which bound what is written.
        hashed: the hash of the model, by which its transcripts are kept for another run; empty keeps none.
    """
    if not hashed:
        ids, given = _transcribed(model, batch, seconds)
    else:
        digest = hashlib.sha256()
        for _, tensor in sorted(batch.items()):
            digest.update(tensor.contiguous().numpy().data)

        def write() -> Tensor:  # (1, 1 + length), how many are given first
            written, count = _transcribed(model, batch, seconds)
            return torch.cat([torch.full_like(written[:, :1], count), written], 1)

        both = kept_ids(
            f"{hashed} transcript of {_most(model, seconds)} tokens at most {digest.hexdigest()}",
            write,
            "the transcripts",
        )
        ids, given = both[:, 1:], int(both[0, 0])
    return ids, given


@torch.no_grad()
def _transcribed(model: Any, batch: Batch, seconds: float) -> tuple[Tensor, int]:
    given: list[Tensor] = []

    def first(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not given:
            given.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    with model.get_decoder().register_forward_pre_hook(first, with_kwargs=True):
        ids = _generate(model, batch, seconds)
    prompt = given[0][:1].to(ids)
    count = prompt.shape[1]
    if not torch.equal(ids[:, :count], prompt):  # Whisper's leaves out what it was given
        ids = torch.cat([prompt, ids], 1)
    end = model.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    if end is not None and int(ids[0, -1]) != end:
        ids = torch.cat([ids, torch.full_like(ids[:, :1], end)], 1)
    return ids.cpu(), count


@torch.no_grad()
def words_of(model: Any, tokenizer: Any, batch: Batch, seconds: float) -> str:
    """Return the words that a model hears in one clip."""
    if has_two_stacks(model):
        return str(tokenizer.decode(_generate(model, batch, seconds)[0], skip_special_tokens=True))
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name not in OF_DECODER}
    return str(tokenizer.decode(model(**inputs).logits.argmax(-1)[0]))


def _generate(model: Any, batch: Batch, seconds: float) -> Tensor:
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name not in OF_DECODER}
    words = lambda error: f"{type(model).__name__} does not transcribe speech ({first_line(error)})"  # noqa: E731
    with quiet_bars(), models_errors(words):
        return model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=_most(model, seconds))  # type: ignore[no-any-return]


def _most(model: Any, seconds: float) -> int:
    """Return the most tokens that are written of a clip; the decoder may have fewer positions."""
    places = getattr(model.config, "max_target_positions", None) or getattr(
        model.config, "max_position_embeddings", None
    )
    most = LEAST + round(PER_SECOND * seconds)
    return most if places is None else max(min(most, int(places) - GIVEN), 1)
