"""Texts sampled from the model itself, so that no data is needed.

Half of the sequences of a chat model begin with its template's user turn, so that it writes both a request and the answer;
the others, and all those of a plain language model, begin with the beginning-of-text token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.progress import progress

BATCH = 64


def user_turn_prefix(tokenizer: Any) -> str | None:
    """What the chat template writes before a user's words, or None if the tokenizer has no such template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "\u2063content\u2063"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    except Exception:  # a template may refuse anything; it is data, not ours
        return None
    before, found, _ = str(text).partition(mark)
    return before if found else None


@torch.no_grad()
def sample_texts(
    model: nn.Module,
    tokenizer: Any,
    *,
    sequences: int,
    length: int,
    seed: int,
    quiet: bool = False,
) -> Tensor:  # (sequences, length), int64
    """Sample token sequences from a language model, at temperature 1, with no truncation of its distribution.

    Raises:
        TwofoldError: if the model can't generate.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise TwofoldError("this model can't generate text to calibrate on; give it texts with --calibration")
    start = next(
        (t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if t is not None), 0
    )
    prefixes = [[start]]
    chat = user_turn_prefix(tokenizer)
    if chat:
        prefixes.append(tokenizer(chat, add_special_tokens=False)["input_ids"])
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    samples: list[Tensor] = []
    jobs = [(prefix, count) for prefix, count in zip(prefixes, _split(sequences, len(prefixes)), strict=True) if count]
    with progress("Sampling texts from the model", sequences * length, unit="tokens", quiet=quiet) as tick:
        for prefix, count in jobs:
            for begin in range(0, count, BATCH):
                rows = min(BATCH, count - begin)
                ids = torch.tensor(prefix[:length]).expand(rows, -1)
                samples.append(_continue(model, ids, length, generator, device, tick))
    return torch.cat(samples)


def _split(total: int, parts: int) -> list[int]:
    return [total // parts + (1 if i < total % parts else 0) for i in range(parts)]


def _continue(model: nn.Module, ids: Tensor, length: int, generator: torch.Generator, device: Any, tick: Any) -> Tensor:
    cache, step = None, ids
    tick(ids.numel())
    while ids.shape[1] < length:
        output = model(input_ids=step.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        step = draw(torch.softmax(output.logits[:, -1].float(), -1).cpu(), generator)[:, None]
        ids = torch.cat([ids, step], 1)
        tick(len(ids))
    return ids


def draw(
    probabilities: Tensor,  # (rows, vocabulary)
    generator: torch.Generator,
) -> Tensor:  # (rows,), int64
    """Draw one token a row by inverting the cumulative distribution (many times faster here than torch.multinomial)."""
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand(len(cumulative), 1, generator=generator).to(cumulative)
    picked = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    return picked[:, 0].clamp_max(probabilities.shape[-1] - 1)
